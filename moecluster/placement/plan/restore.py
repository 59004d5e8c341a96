"""Changes that are made whatever they cost: no actor exceeds its slots, and every expert has a replica.

Used after a failure (experts whose last replica is lost) and for draining (actors whose slots are set to 0).
"""

import numpy as np

from moecluster.errors import ResourceError
from moecluster.placement.layout import Bools, Fleet, Floats, Ints, Layout, with_added, with_shares, without


def restored(layout: Layout, load_LE: Floats, fleet: Fleet, cold_LE: Bools | None = None) -> Layout:
    """Returns the nearest layout that fits the slots and places all but cold experts; the layout itself if it does.

    Replicas beyond an actor's slots are dropped: first those of experts with other replicas, then those of least load.
    Lost experts are placed hottest first, each on the actor with a free slot that ends up least loaded; where no slot
    is free, the least loaded replica of an expert with several gives way. Raises ResourceError for fewer slots than
    experts.
    """
    check_room(layout.num_experts_L if cold_LE is None else layout.num_experts_L - cold_LE.sum(axis=1), fleet)
    dropped_R = _beyond_slots_R(layout, load_LE, fleet)
    hosted_X = np.zeros(layout.num_layers * layout.max_experts, dtype=np.bool_)
    hosted_X[layout.expert_key_R[~dropped_R]] = True
    lost_X = all_expert_keys(layout.num_experts_L)
    lost_X = lost_X[~hosted_X[lost_X]]
    if cold_LE is not None:
        lost_X = lost_X[~cold_LE.reshape(-1)[lost_X]]
    if not dropped_R.any() and len(lost_X) == 0:
        whole_R = layout.scaled_share_R  # where one of several replicas was lost, the others share its part
        return layout if np.allclose(whole_R, layout.share_R, rtol=0, atol=1e-9) else with_shares(layout, whole_R)
    room = _Room(layout, load_LE, fleet, dropped_R)
    hottest_first_X = lost_X[np.argsort(-load_LE.reshape(-1)[lost_X], kind="stable")]
    layer_N, expert_N = np.divmod(hottest_first_X, max(layout.max_experts, 1))
    actor_N = [room.place(int(layer), int(expert)) for layer, expert in zip(layer_N, expert_N, strict=True)]
    after = with_added(without(layout, room.dropped_R), layer_N, expert_N, np.array(actor_N, dtype=np.int64), share=1.0)
    return with_shares(after, after.scaled_share_R)


def check_room(num_experts_L: Ints, fleet: Fleet) -> None:
    """Raises ResourceError if some layer has more experts than the fleet has slots."""
    slots, most = int(fleet.slots_A.sum()), int(num_experts_L.max(initial=0))
    if slots < most:
        raise ResourceError(
            f"the expert actors have {slots} slots for each layer, which has up to {most} experts: "
            f"{most - slots} slots are missing; add actors, or slots to them"
        )


def all_expert_keys(num_experts_L: Ints) -> Ints:
    """Returns layer * E + expert of every expert, as in Layout.expert_key_R."""
    layer_X = np.repeat(np.arange(len(num_experts_L)), num_experts_L)
    first_X = np.repeat(np.cumsum(num_experts_L) - num_experts_L, num_experts_L)
    keys: Ints = layer_X * int(num_experts_L.max(initial=0)) + np.arange(len(layer_X)) - first_X
    return keys


def _beyond_slots_R(layout: Layout, load_LE: Floats, fleet: Fleet) -> Bools:
    """Returns which replicas must leave: on each actor the least needed ones beyond its slots."""
    key_R = layout.layer_R * fleet.num_actors + layout.actor_R
    count_LA = np.bincount(key_R, minlength=layout.num_layers * fleet.num_actors)
    if (count_LA <= np.tile(fleet.slots_A, layout.num_layers)).all():
        return np.zeros(layout.num_replicas, dtype=np.bool_)
    count_LE = np.bincount(layout.expert_key_R)
    load_R = load_LE.reshape(-1)[layout.expert_key_R] * layout.share_R
    neediest_first = np.lexsort((-load_R, count_LE[layout.expert_key_R] > 1, key_R))
    first_LA = np.cumsum(count_LA) - count_LA
    rank_R = np.empty(layout.num_replicas, dtype=np.int64)
    rank_R[neediest_first] = np.arange(layout.num_replicas) - first_LA[key_R[neediest_first]]
    beyond_R: Bools = rank_R >= fleet.slots_A[layout.actor_R]
    return beyond_R


class _Room:
    """A layout's free slots while lost experts are placed, and the replicas that gave way."""

    def __init__(self, layout: Layout, load_LE: Floats, fleet: Fleet, dropped_R: Bools) -> None:
        self.dropped_R = dropped_R.copy()
        self._layout, self._load_LE, self._speed_A = layout, load_LE, fleet.speed_A
        shape = (layout.num_layers, fleet.num_actors)
        key_R = (layout.layer_R * fleet.num_actors + layout.actor_R)[~dropped_R]
        share_R = np.where(dropped_R, 0.0, layout.share_R)
        self._load_R = load_LE.reshape(-1)[layout.expert_key_R] * share_R
        self._load_LA = np.bincount(key_R, self._load_R[~dropped_R], minlength=shape[0] * shape[1]).reshape(shape)
        self._free_LA = fleet.slots_A - np.bincount(key_R, minlength=shape[0] * shape[1]).reshape(shape)
        self._count_X = np.bincount(layout.expert_key_R[~dropped_R], minlength=layout.num_layers * layout.max_experts)

    def place(self, layer: int, expert: int) -> int:
        """Takes a slot for a lost expert and returns its actor."""
        if not (self._free_LA[layer] > 0).any():
            self._give_way(layer)
        load = self._load_LE[layer, expert]
        level_A = (self._load_LA[layer] + load) / self._speed_A
        actor = int(np.where(self._free_LA[layer] > 0, level_A, np.inf).argmin())
        self._load_LA[layer, actor] += load
        self._free_LA[layer, actor] -= 1
        return actor

    def _give_way(self, layer: int) -> None:
        first, last = np.searchsorted(self._layout.layer_R, (layer, layer + 1))
        several_R = self._count_X[self._layout.expert_key_R[first:last]] > 1
        choice_R = np.where(several_R & ~self.dropped_R[first:last], self._load_R[first:last], np.inf)
        least = first + int(choice_R.argmin())
        actor = self._layout.actor_R[least]
        self.dropped_R[least] = True
        self._count_X[self._layout.expert_key_R[least]] -= 1
        self._load_LA[layer, actor] -= self._load_R[least]
        self._free_LA[layer, actor] += 1
