"""The planner's numbers and the cluster's names: layouts out of replicas, and back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moecluster.placement.layout import Floats, Ints, Layout, make_layout
from moecluster.types import ExpertId, Replica


@dataclass(frozen=True, kw_only=True)
class Names:
    """Which layer and which actor a position stands for."""

    layer_experts: Mapping[int, int]  # MoE layer -> its number of experts
    actors: tuple[str, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.layer_experts))

    @property
    def num_experts_L(self) -> Ints:
        return np.array([self.layer_experts[layer] for layer in self.layers], dtype=np.int64)


def to_layout(replicas: Iterable[Replica], names: Names) -> Layout:
    """The replicas that stand on the named actors, each expert's shares scaled to sum to 1."""
    layer_at = {layer: i for i, layer in enumerate(names.layers)}
    actor_at = {actor: i for i, actor in enumerate(names.actors)}
    here = [r for r in replicas if r.actor in actor_at]
    layout = make_layout(
        names.num_experts_L,
        np.array([layer_at[r.expert.layer] for r in here], dtype=np.int64),
        np.array([r.expert.index for r in here], dtype=np.int64),
        np.array([actor_at[r.actor] for r in here], dtype=np.int64),
        np.array([r.share for r in here], dtype=np.float64),
    )
    return replace(layout, share_R=scaled_shares(layout))


def to_replicas(layout: Layout, names: Names) -> dict[int, tuple[Replica, ...]]:
    """Layer -> its replicas; every layer has an entry."""
    found: dict[int, list[Replica]] = {layer: [] for layer in names.layers}
    for layer_at, index, actor_at, share in zip(
        layout.layer_R.tolist(), layout.expert_R.tolist(), layout.actor_R.tolist(), layout.share_R.tolist(), strict=True
    ):
        layer = names.layers[layer_at]
        expert = ExpertId(layer=layer, index=index)
        found[layer].append(Replica(expert=expert, actor=names.actors[actor_at], share=share))
    return {layer: tuple(replicas) for layer, replicas in found.items()}


def scaled_shares(layout: Layout) -> Floats:
    """Shares that sum to 1 for each expert: as they relate to each other, or equal where all are 0. [R]"""
    keys = layout.num_layers * layout.max_experts
    sum_R = np.bincount(layout.expert_key_R, weights=layout.share_R, minlength=keys)[layout.expert_key_R]
    count_R = np.bincount(layout.expert_key_R, minlength=keys)[layout.expert_key_R]
    return np.where(sum_R > 0, layout.share_R / np.where(sum_R > 0, sum_R, 1.0), 1.0 / count_R)
