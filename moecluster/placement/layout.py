"""The planner's numbers: a fleet of actors, and a layout of replicas on it. Independent of names and of gRPC.

Shape letters: L MoE layers, E experts of a layer (the most, if layers differ), A actors, R replicas over all layers.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The actors that can hold replicas. They may differ in everything; no number needs to divide another."""

    slots_A: Ints  # slots for replicas of EACH layer; 0: the actor is being drained
    speed_A: Floats  # rows per busy second, in any unit; positive
    node_A: Ints  # the node that the actor is on; equal numbers share a node
    expert_bytes_L: Floats  # of one expert of the layer

    @property
    def num_actors(self) -> int:
        return len(self.slots_A)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which replicas are placed where, and their shares. Sorted by (layer, expert, actor), each at most once."""

    num_experts_L: Ints  # E of each layer
    layer_R: Ints  # position of the layer, in [0, L)
    expert_R: Ints  # in [0, num_experts_L[layer])
    actor_R: Ints  # in [0, A)
    share_R: Floats  # those of an expert sum to 1

    @property
    def num_replicas(self) -> int:
        return len(self.layer_R)

    @property
    def num_layers(self) -> int:
        return len(self.num_experts_L)

    @property
    def max_experts(self) -> int:
        """E of the widest layer: the width of load_LE."""
        return int(self.num_experts_L.max(initial=0))

    @property
    def expert_key_R(self) -> Ints:
        """layer * E + expert: indexes a flattened load_LE."""
        return self.layer_R * self.max_experts + self.expert_R

    @property
    def scaled_share_R(self) -> Floats:
        """The shares with sums of exactly 1: equal ones where all of an expert are 0."""
        return scaled_shares(self.share_R, self.expert_key_R)


def scaled_shares(share_R: Floats, expert_R: Ints) -> Floats:
    """Shares that sum to 1 for each expert: as they relate to each other, or equal where all are 0. [R]

    expert_R: which expert each replica is of, by any number that is not negative.
    """
    sum_R = np.bincount(expert_R, weights=share_R)[expert_R]
    count_R = np.bincount(expert_R)[expert_R]
    shares: Floats = np.where(sum_R > 0, share_R, 1.0) / np.where(sum_R > 0, sum_R, count_R)
    return shares


def make_layout(num_experts_L: Ints, layer_R: Ints, expert_R: Ints, actor_R: Ints, share_R: Floats) -> Layout:
    """Returns a layout of replicas given in any order."""
    num_experts = int(np.max(num_experts_L, initial=0))
    num_actors = int(np.max(actor_R, initial=0)) + 1
    key_R = (np.asarray(layer_R, dtype=np.int64) * num_experts + expert_R) * num_actors + actor_R
    order = np.argsort(key_R.astype(np.int64), kind="stable")  # fast on nearly sorted input, the usual case
    return Layout(
        num_experts_L=np.asarray(num_experts_L, dtype=np.int64),
        layer_R=np.asarray(layer_R, dtype=np.int64)[order],
        expert_R=np.asarray(expert_R, dtype=np.int64)[order],
        actor_R=np.asarray(actor_R, dtype=np.int64)[order],
        share_R=np.asarray(share_R, dtype=np.float64)[order],
    )


def with_shares(layout: Layout, share_R: Floats) -> Layout:
    """Returns the same replicas with other shares."""
    return dataclasses.replace(layout, share_R=share_R)


def without(layout: Layout, dropped_R: Bools) -> Layout:
    """Returns the layout without the dropped replicas. Shares stay as they were: they may no longer sum to 1."""
    kept_R = ~dropped_R
    return Layout(
        num_experts_L=layout.num_experts_L,
        layer_R=layout.layer_R[kept_R],
        expert_R=layout.expert_R[kept_R],
        actor_R=layout.actor_R[kept_R],
        share_R=layout.share_R[kept_R],
    )


def with_added(layout: Layout, layer_N: Ints, expert_N: Ints, actor_N: Ints, share: float = 0.0) -> Layout:
    """Returns the layout with N more replicas, each with the same share."""
    return make_layout(
        layout.num_experts_L,
        np.concatenate((layout.layer_R, layer_N)),
        np.concatenate((layout.expert_R, expert_N)),
        np.concatenate((layout.actor_R, actor_N)),
        np.concatenate((layout.share_R, np.full(len(layer_N), share))),
    )


def of_layers(layout: Layout, layers: Ints) -> Layout:
    """Returns some layers, in ascending order, as a layout of their own, with layer_R counted among them.

    Its E may be smaller: its load is load_LE[layers, : part.max_experts].
    """
    place_L = np.full(layout.num_layers, -1)
    place_L[layers] = np.arange(len(layers))
    kept_R = place_L[layout.layer_R] >= 0
    return dataclasses.replace(
        layout,
        num_experts_L=layout.num_experts_L[layers],
        layer_R=place_L[layout.layer_R[kept_R]],
        expert_R=layout.expert_R[kept_R],
        actor_R=layout.actor_R[kept_R],
        share_R=layout.share_R[kept_R],
    )


def with_layers(layout: Layout, layers: Ints, part: Layout) -> Layout:
    """Returns the layout with some layers replaced: the inverse of `of_layers`."""
    stays_L = np.ones(layout.num_layers, dtype=np.bool_)
    stays_L[layers] = False
    other_R = stays_L[layout.layer_R]
    return make_layout(
        layout.num_experts_L,
        np.concatenate((layout.layer_R[other_R], layers[part.layer_R])),
        np.concatenate((layout.expert_R[other_R], part.expert_R)),
        np.concatenate((layout.actor_R[other_R], part.actor_R)),
        np.concatenate((layout.share_R[other_R], part.share_R)),
    )


def actor_load_LA(layout: Layout, load_LE: Floats, fleet: Fleet) -> Floats:
    """Returns the load of every actor in every layer, divided by its speed: [L, A]."""
    loads: Floats = carried_LA(layout, load_LE, fleet.num_actors) / fleet.speed_A
    return loads


def carried_LA(layout: Layout, load_LE: Floats, num_actors: int) -> Floats:
    """Returns the load that every actor carries in every layer: [L, A]."""
    load_R = load_LE.reshape(-1)[layout.expert_key_R] * layout.share_R
    key_R = layout.layer_R * num_actors + layout.actor_R
    load_LA: Floats = np.bincount(key_R, weights=load_R, minlength=layout.num_layers * num_actors).astype(np.float64)
    return load_LA.reshape(layout.num_layers, num_actors)


def added_R(before: Layout, after: Layout) -> Bools:
    """Returns which replicas of `after` are not in `before`: [R of after]."""
    width = int(max(before.actor_R.max(initial=0), after.actor_R.max(initial=0))) + 1
    before_R = before.expert_key_R * width + before.actor_R
    # A layout has no duplicate replicas; checking that takes most of the time with tens of thousands of them.
    return ~np.isin(after.expert_key_R * width + after.actor_R, before_R, assume_unique=True)


def moved_bytes(before: Layout, after: Layout, fleet: Fleet) -> float:
    """Returns the bytes loaded when going from one layout to another."""
    return float(fleet.expert_bytes_L[after.layer_R[added_R(before, after)]].sum())
