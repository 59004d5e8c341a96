"""Converts between the planner's numbers and the cluster's names, and defines balancedness.

A layer's balancedness is the mean load per unit of speed over its actors, divided by that of the most loaded actor;
with equal speeds, mean load / max load. It lies in [0, 1], and 1 is perfect. An actor counts if it has slots, or if it
still carries load of the layer without slots (it is being drained). A layer without load has no balancedness. This is
the only definition, for display and planning alike.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moecluster.placement.layout import Bools, Fleet, Floats, Ints, Layout, carried_LA, make_layout, scaled_shares
from moecluster.types import ExpertId, Placement, Replica


def balancedness_of_loads_L(load_LA: Floats, speed_A: Floats, has_room_A: Bools) -> Floats:
    """Returns the balancedness [L] of the actors' loads; NaN for layers without load. Loads and speeds are at least 0.

    An actor of speed 0 that carries load never finishes: 0.
    """
    counts_LA = has_room_A | (load_LA > 0)
    total_L = load_LA.sum(axis=1)
    speed_L = (counts_LA * speed_A).sum(axis=1)
    stuck_L = ((load_LA > 0) & (speed_A <= 0)).any(axis=1)
    worst_L = np.divide(load_LA, speed_A, out=np.zeros_like(load_LA), where=speed_A > 0).max(axis=1, initial=0.0)
    even_L = np.divide(total_L, speed_L, out=np.zeros_like(total_L), where=speed_L > 0)
    of_L = np.divide(even_L, worst_L, out=np.full_like(total_L, np.nan), where=worst_L > 0)
    of_L[stuck_L] = 0.0
    balancedness: Floats = np.minimum(of_L, 1.0)  # rounding may exceed 1; NaN stays
    return balancedness


def balancedness_L(layout: Layout, load_LE: Floats, fleet: Fleet) -> Floats:
    """Returns the balancedness [L] of a layout, over the experts that have replicas; NaN for layers without load."""
    return balancedness_of_loads_L(
        carried_LA(layout, load_LE, fleet.num_actors), fleet.speed_A.astype(np.float64), fleet.slots_A > 0
    )


def mean_balancedness(layout: Layout, load_LE: Floats, fleet: Fleet) -> float | None:
    """Returns the mean over the layers that carry load; None if none does."""
    of_L = balancedness_L(layout, load_LE, fleet)
    judged = of_L[~np.isnan(of_L)]
    return float(judged.mean()) if len(judged) else None


def layer_balancedness(placement: Placement, tokens: Mapping[ExpertId, int]) -> dict[int, float]:
    """Returns layer -> balancedness over all actors, at equal speeds. Omits layers that got no tokens.

    tokens: assignments per expert.
    """
    actors = {actor: position for position, actor in enumerate(placement.actors)}
    layers = {layer: position for position, layer in enumerate(sorted({r.expert.layer for r in placement.replicas}))}
    load_LA = np.zeros((len(layers), len(actors)))
    for replica in placement.replicas:
        load_LA[layers[replica.expert.layer], actors[replica.actor]] += tokens.get(replica.expert, 0) * replica.share
    of_L = balancedness_of_loads_L(load_LA, np.ones(len(actors)), np.ones(len(actors), dtype=np.bool_))
    return {layer: float(of_L[position]) for layer, position in layers.items() if not np.isnan(of_L[position])}


@dataclass(frozen=True, kw_only=True)
class Names:
    """The layers and actors that positions stand for."""

    layer_experts: Mapping[int, int]  # MoE layer -> its number of experts
    actors: tuple[str, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.layer_experts))

    @property
    def num_experts_L(self) -> Ints:
        return np.array([self.layer_experts[layer] for layer in self.layers], dtype=np.int64)


def to_layout(replicas: Iterable[Replica], names: Names) -> Layout:
    """Returns the layout of the replicas on the named actors, each expert's shares scaled to sum to 1."""
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
    return replace(layout, share_R=layout.scaled_share_R)


def to_replicas(layout: Layout, names: Names) -> dict[int, tuple[Replica, ...]]:
    """Returns layer -> its replicas; every layer has an entry."""
    found: dict[int, list[Replica]] = {layer: [] for layer in names.layers}
    for layer_at, index, actor_at, share in zip(
        layout.layer_R.tolist(), layout.expert_R.tolist(), layout.actor_R.tolist(), layout.share_R.tolist(), strict=True
    ):
        layer = names.layers[layer_at]
        expert = ExpertId(layer=layer, index=index)
        found[layer].append(Replica(expert=expert, actor=names.actors[actor_at], share=share))
    return {layer: tuple(replicas) for layer, replicas in found.items()}


def with_whole_shares(replicas: Sequence[Replica]) -> tuple[Replica, ...]:
    """The replicas with each expert's shares scaled to sum to 1; equal ones where all are 0."""
    number = {expert: i for i, expert in enumerate(dict.fromkeys(r.expert for r in replicas))}
    share_R = scaled_shares(
        np.array([r.share for r in replicas], dtype=np.float64),
        np.array([number[r.expert] for r in replicas], dtype=np.int64),
    )
    return tuple(replace(r, share=share) for r, share in zip(replicas, share_R.tolist(), strict=True))
