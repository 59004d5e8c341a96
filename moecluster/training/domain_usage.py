"""Which experts serve which domain of text: the shares, and a table of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moecluster.types import ExpertId

Counts = Mapping[ExpertId, int]  # assignments (token, expert)


@dataclass(frozen=True, kw_only=True)
class DomainMap:
    """share_DLE: the fraction of a domain's assignments in a layer that go to each expert; sums to 1 over experts."""

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    share_DLE: np.ndarray

    @property
    def num_experts(self) -> int:
        return int(self.share_DLE.shape[2])

    def specialisation(self) -> float:
        """Returns the total variation distance between two domains' shares, mean over pairs of domains and layers.

        0: every expert serves all domains alike; 1: no expert serves two domains.
        """
        pairs = [(a, b) for a in range(len(self.domains)) for b in range(a)]
        distances = [0.5 * np.abs(self.share_DLE[a] - self.share_DLE[b]).sum(axis=1).mean() for a, b in pairs]
        return float(np.mean(distances)) if distances else 0.0


def domain_map(counts: Mapping[str, Counts], layer_experts: Mapping[int, int]) -> DomainMap:
    """counts: domain -> assignments counted on its text. layer_experts: MoE layer -> number of experts."""
    layers = tuple(sorted(layer_experts))
    share_DLE = np.zeros((len(counts), len(layers), max(layer_experts.values())))
    for d, experts in enumerate(counts.values()):
        for expert, count in experts.items():
            share_DLE[d, layers.index(expert.layer), expert.index] += count
    share_DLE /= np.maximum(share_DLE.sum(axis=2, keepdims=True), 1)
    return DomainMap(domains=tuple(counts), layers=layers, share_DLE=share_DLE)


def table_rows(shares: DomainMap, actors: Mapping[ExpertId, str]) -> Sequence[tuple[str, ...]]:
    """Returns one row per expert: layer, expert, actor, then the share of each domain in percent."""
    return [
        (
            str(layer),
            str(expert),
            actors.get(ExpertId(layer=layer, index=expert), ""),
            *(f"{100 * shares.share_DLE[d, i, expert]:.0f} %" for d in range(len(shares.domains))),
        )
        for i, layer in enumerate(shares.layers)
        for expert in range(shares.num_experts)
    ]
