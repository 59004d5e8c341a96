"""Splits each expert's tokens over its replicas by share.

A hash of (token, layer, expert) selects a replica by the expert's cumulative shares, so that the same token takes the
same replica whatever the batch, the router and the order of the tokens. A token is identified by a few values of its
row and by its gate weights at the layer: that needs no sequence ids, and works for rows without a sequence. Gate
weights alone are not enough: those of a hash gate, or of a renormalized top-1, are the same for every token.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from moecluster.errors import NotHosted
from moecluster.placement.layout import scaled_shares
from moecluster.types import ExpertId, Placement

NO_ACTOR = -1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the step of splitmix64


@dataclass(frozen=True, kw_only=True)
class LayerTable:
    """The actors and shares of one layer's experts.

    actor_of_ER: index into actors of each expert's r-th replica, NO_ACTOR beyond its last.
    bound_ER: cumulative shares; 1 from the last replica with a positive share on.
    """

    layer: int
    actors: tuple[str, ...]
    actor_of_ER: npt.NDArray[np.int64]
    bound_ER: npt.NDArray[np.float64]

    @property
    def num_experts(self) -> int:
        return len(self.actor_of_ER)

    @property
    def replicated(self) -> bool:
        return bool(self.actor_of_ER.shape[1] > 1)


def layer_table(
    placement: Placement, layer: int, avoid: Collection[str] = (), aside: Collection[tuple[str, ExpertId]] = ()
) -> LayerTable:
    """The layer's part of a placement without the actors to avoid; the remaining shares are scaled to sum to 1.

    aside: replicas (actor, expert) to leave out as well, unless the expert has no other replica.
    """
    num_experts = placement.layer_experts[layer]
    actors = tuple(sorted(placement.actors))
    index_of = {actor: i for i, actor in enumerate(actors)}
    replicas: list[list[tuple[int, float]]] = [[] for _ in range(num_experts)]
    for replica in placement.replicas:
        if replica.expert.layer == layer and replica.actor not in avoid and replica.actor in index_of:
            replicas[replica.expert.index].append((index_of[replica.actor], replica.share))
    for name, sick in aside:
        if sick.layer == layer:
            others = [place for place in replicas[sick.index] if place[0] != index_of.get(name)]
            replicas[sick.index] = others or replicas[sick.index]
    most = max((len(r) for r in replicas), default=0) or 1
    actor_of_ER = np.full((num_experts, most), NO_ACTOR, dtype=np.int64)
    bound_ER = np.ones((num_experts, most), dtype=np.float64)
    for places in replicas:
        places.sort()
    # If all replicas of an expert have share 0, they get equal shares, so that requests are served rather than refused.
    share_R = scaled_shares(
        np.array([share for places in replicas for _, share in places], dtype=np.float64),
        np.repeat(np.arange(num_experts), [len(places) for places in replicas]),
    )
    shares = iter(share_R.tolist())
    for expert, places in enumerate(replicas):
        own = [next(shares) for _ in places]
        last = max((r for r, share in enumerate(own) if share > 0), default=0)
        for r, ((actor, _), reached) in enumerate(zip(places, accumulate(own), strict=True)):
            actor_of_ER[expert, r] = actor
            bound_ER[expert, r] = reached if r < last else 1.0  # exactly, despite rounding of the sum
    return LayerTable(layer=layer, actors=actors, actor_of_ER=actor_of_ER, bound_ER=bound_ER)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64: every input bit affects the whole word."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def content_keys(row_words_TW: npt.NDArray[np.float32], weights_TK: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
    """One key per token, hashed from the bits of a few values of its row and of its gate weights.

    Tokens that agree in these values have equal keys in any batch and on any router; -0 counts as 0. The words are
    summed with odd multipliers (multilinear hashing, Carter and Wegman 1979), and the sum is mixed.
    """
    words_TV = np.concatenate([row_words_TW, weights_TK], axis=1) + np.float32(0)  # which turns -0 into 0
    multipliers_V = _mix(GOLDEN * np.arange(1, words_TV.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    return _mix(words_TV.view(np.uint32).astype(np.uint64) @ multipliers_V)


def choose_actors(
    table: LayerTable, experts_P: npt.NDArray[np.int64], keys_P: npt.NDArray[np.uint64] | None
) -> npt.NDArray[np.int64]:
    """The index of the actor for each (token, expert) pair; keys_P is needed only if experts are replicated.

    Raises NotHosted if an expert of a pair has no replica in the table.
    """
    actor_P: npt.NDArray[np.int64]
    if not table.replicated:
        actor_P = table.actor_of_ER[experts_P, 0]
    else:
        assert keys_P is not None
        salt_P = experts_P.astype(np.uint64) + (np.uint64(table.layer + 1) << np.uint64(32))
        point_P = (_mix(keys_P + _mix(salt_P)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        replica_P = (point_P[:, None] >= table.bound_ER[experts_P]).sum(axis=1)
        actor_P = table.actor_of_ER[experts_P, replica_P]
    if (actor_P == NO_ACTOR).any():
        lost = sorted({int(e) for e in experts_P[actor_P == NO_ACTOR]})
        raise NotHosted(f"layer {table.layer}: no replica of experts {lost}", experts=tuple(lost))
    return actor_P
