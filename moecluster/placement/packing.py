"""Packing replicas of like load: heaviest first, each on the actor that it loads least, in all layers at once."""

import numpy as np

from moecluster.placement.layout import Fleet, Floats, Ints, Layout, make_layout
from moecluster.placement.replica_counts import planned_counts


def packed(load_LE: Floats, num_experts_L: Ints, fleet: Fleet) -> Layout:
    """A layout of `planned_counts`, with equal shares (LPT: Graham, 1969, with slots). The slots suffice for all.

    An actor takes an expert once, and the second replica goes to another node where one has a slot; a replica that fits
    nowhere is left out.
    """
    num_layers, max_experts = load_LE.shape
    count_LE = planned_counts(load_LE, num_experts_L, fleet)
    part_LE = load_LE / np.maximum(count_LE, 1)
    expert_LS = _heaviest_first(part_LE, count_LE)
    load_LA = np.zeros((num_layers, fleet.num_actors))
    free_LA = np.tile(fleet.slots_A, (num_layers, 1))
    holds_LEA = np.zeros((num_layers, max_experts, fleet.num_actors), dtype=np.bool_)
    missing_L = num_experts_L.copy()  # experts that stand nowhere yet: a slot must remain for each
    for expert_L in expert_LS.T:
        going_L = np.flatnonzero(expert_L >= 0)
        expert = expert_L[going_L]
        held = holds_LEA[going_L, expert]
        times = held.sum(axis=1)
        open_ = (free_LA[going_L] > 0) & ~held
        open_[(times > 0) & (free_LA[going_L].sum(axis=1) <= missing_L[going_L])] = False
        first_node = fleet.node_A[held.argmax(axis=1)]
        elsewhere = open_ & (fleet.node_A != first_node[:, None])
        apart = (times == 1) & elsewhere.any(axis=1)
        open_[apart] = elsewhere[apart]
        part = part_LE[going_L, expert]
        level = np.where(open_, (load_LA[going_L] + part[:, None]) / fleet.speed_A, np.inf)
        actor = level.argmin(axis=1)
        fits = open_.any(axis=1)
        layer, expert, actor = going_L[fits], expert[fits], actor[fits]
        holds_LEA[layer, expert, actor] = True
        load_LA[layer, actor] += part[fits]
        free_LA[layer, actor] -= 1
        missing_L[layer] -= times[fits] == 0
    layer_R, expert_R, actor_R = np.nonzero(holds_LEA)
    placed_LE = holds_LEA.sum(axis=2)
    return make_layout(num_experts_L, layer_R, expert_R, actor_R, 1 / placed_LE[layer_R, expert_R])


def _heaviest_first(part_LE: Floats, count_LE: Ints) -> Ints:
    """The expert of each replica, by falling load, [L, most replicas of a layer]; -1 beyond a layer's own."""
    num_layers, max_experts = part_LE.shape
    total_L = count_LE.sum(axis=1)
    key_R = np.repeat(np.arange(num_layers * max_experts), count_LE.ravel())
    layer_R = key_R // max_experts
    order_R = np.lexsort((key_R, -part_LE.ravel()[key_R], layer_R))
    expert_LS = np.full((num_layers, int(total_L.max(initial=0))), -1)
    place_R = np.arange(len(key_R)) - (np.cumsum(total_L) - total_L)[layer_R]
    expert_LS[layer_R, place_R] = key_R[order_R] % max_experts
    return expert_LS
