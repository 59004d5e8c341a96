"""Uses the slots that balance does not need: as headroom for changing load, and against node failures.

Spare replicas go to experts that are too hot for their replicas, so that shares have room when the load changes; then
to experts on one node only, so that the loss of a node costs as little as possible. A free slot is used first;
otherwise the replica least needed gives way, but only to an expert that needs it clearly more, so that experts of equal
need do not keep swapping. No layer's greatest load rises by more than MOST_LOSS.
"""

import numpy as np

from moecluster.placement.layout import (
    Bools,
    Fleet,
    Floats,
    Ints,
    Layout,
    actor_load_LA,
    added_R,
    of_layers,
    with_added,
    with_layers,
    with_shares,
    without,
)
from moecluster.placement.plan.replica_counts import HEADROOM, in_fair_loads, urgency
from moecluster.placement.plan.shares import least_max_shares

CLEARLY = 1.25  # times the need of the replica that gives way
MOST_LOSS = 0.001  # of a layer's greatest load, relatively
TOO_HOT, EXPOSED, NEVER = 2, 1, 3  # classes of need, and of what an expert becomes by giving way; 0: neither


def with_spare_slots_used(layout: Layout, load_LE: Floats, fleet: Fleet) -> Layout:
    """Returns the layout with a new replica of share 0 in every free slot that can take one.

    Experts in the order of `replica_counts.urgency`. A new replica goes to an actor with the most free slots, then by
    preference to a node without the expert, then to the actor with the least divisible load so far.
    """
    holds_LEA, free_LA = held(layout, fleet)
    num_layers, max_experts, _ = holds_LEA.shape
    every_L = np.arange(num_layers)
    count_LE = holds_LEA.sum(axis=2)
    unit_LE = in_fair_loads(load_LE, fleet)
    one_node_LE = on_one_node(layout, fleet).reshape(num_layers, max_experts)
    flexible_LA = np.einsum("le,lea->la", np.where(count_LE > 1, unit_LE / np.maximum(count_LE, 1), 0.0), holds_LEA)
    open_LE = count_LE > 0
    added: list[tuple[Ints, Ints, Ints]] = []
    going_L = every_L[(free_LA > 0).any(axis=1) & open_LE.any(axis=1)]
    while len(going_L):
        expert = urgency(unit_LE[going_L], count_LE[going_L], one_node_LE[going_L], open_LE[going_L]).argmax(axis=1)
        mine = holds_LEA[going_L, expert]
        may = (free_LA[going_L] > 0) & ~mine
        fits = may.any(axis=1)
        open_LE[going_L[~fits], expert[~fits]] = False
        layer, expert, may, mine = going_L[fits], expert[fits], may[fits], mine[fits]
        new_node = ~shares_node(mine, fleet.node_A)
        taste = free_LA[layer] + 0.5 * new_node - 0.4 * flexible_LA[layer] / (1 + flexible_LA[layer])
        actor = np.where(may, taste, -np.inf).argmax(axis=1)
        added.append((layer, expert, actor))
        holds_LEA[layer, expert, actor] = True
        free_LA[layer, actor] -= 1
        count_LE[layer, expert] += 1
        one_node_LE[layer, expert] &= ~new_node[np.arange(len(layer)), actor]
        flexible_LA[layer, actor] += unit_LE[layer, expert] / count_LE[layer, expert]
        going_L = going_L[(free_LA[going_L] > 0).any(axis=1) & open_LE[going_L].any(axis=1)]
    if not added:
        return layout
    layer_N, expert_N, actor_N = (np.concatenate(part) for part in zip(*added, strict=True))
    return with_added(layout, layer_N, expert_N, actor_N)


def held(layout: Layout, fleet: Fleet) -> tuple[Bools, Ints]:
    """Returns which actor holds which expert, [L, E, A], and the free slots, [L, A]."""
    holds_LEA = np.zeros((layout.num_layers, layout.max_experts, fleet.num_actors), dtype=np.bool_)
    holds_LEA[layout.layer_R, layout.expert_R, layout.actor_R] = True
    key_R = layout.layer_R * fleet.num_actors + layout.actor_R
    held_LA = np.bincount(key_R, minlength=layout.num_layers * fleet.num_actors).reshape(layout.num_layers, -1)
    return holds_LEA, np.maximum(fleet.slots_A - held_LA, 0)


def on_one_node(layout: Layout, fleet: Fleet) -> Bools:
    """Returns, for each expert key, whether the expert has replicas and one node holds them all: [L * E]."""
    key_R, node_R = layout.expert_key_R, fleet.node_A[layout.actor_R]
    node_X = np.full(layout.num_layers * layout.max_experts, -1)
    node_X[key_R] = node_R  # the node of any one replica
    alone_X: Bools = node_X >= 0
    alone_X[key_R[node_R != node_X[key_R]]] = False
    return alone_X


def leaves_one_node_R(layout: Layout, fleet: Fleet) -> Bools:
    """Returns, for each replica, whether its expert would be on at most one of several nodes without it: [R]."""
    nodes, place_A = np.unique(fleet.node_A, return_inverse=True)
    key_R = layout.expert_key_R * len(nodes) + place_A[layout.actor_R]
    count_XN = np.bincount(key_R, minlength=layout.num_layers * layout.max_experts * len(nodes))
    nodes_X = np.count_nonzero(count_XN.reshape(-1, len(nodes)), axis=1)  # of each expert key
    left_R = nodes_X[layout.expert_key_R] - (count_XN[key_R] == 1)
    leaves: Bools = (left_R <= 1) & (len(nodes) > 1)
    return leaves


def shares_node(holds: Bools, node_A: Ints) -> Bools:
    """[n, A] -> [n, A]: whether any actor on the actor's node holds the row's expert."""
    _, place_A = np.unique(node_A, return_inverse=True)
    on_node = np.zeros((len(holds), int(place_A.max(initial=0)) + 1), dtype=np.bool_)
    row, actor = np.nonzero(holds)
    on_node[row, place_A[actor]] = True
    shares: Bools = on_node[:, place_A]
    return shares


def with_spares_moved(layout: Layout, load_LE: Floats, fleet: Fleet, budget_bytes: float, most_a_layer: int) -> Layout:
    """Returns the layout with some spare replicas placed or moved, most needed first, within the budget.

    layout: with shares of least greatest load; the result has such shares too.
    """
    after, going = layout, np.arange(layout.num_layers)
    for _ in range(most_a_layer):
        layer, expert, actor, gives_way = _wanted_of(after, going, load_LE, fleet)
        paid = np.cumsum(fleet.expert_bytes_L[layer]) <= budget_bytes
        if not paid.any():
            break
        budget_bytes -= float(fleet.expert_bytes_L[layer[paid]].sum())
        dropped_R = np.zeros(after.num_replicas, dtype=np.bool_)
        dropped_R[gives_way[paid & (gives_way >= 0)]] = True
        after = with_added(without(after, dropped_R), layer[paid], expert[paid], actor[paid])
        going = np.sort(layer[paid])  # the other layers would want the same again: nothing, or what was too expensive
    changed = np.unique(after.layer_R[added_R(layout, after)])
    if len(changed) == 0:
        return layout
    part = of_layers(after, changed)
    of_part = load_LE[changed, : part.max_experts]
    part = with_shares(part, least_max_shares(part, of_part, fleet, even=True).share_R)
    worst_before_L = actor_load_LA(layout, load_LE, fleet).max(axis=1)[changed]
    worst_after_L = actor_load_LA(part, of_part, fleet).max(axis=1)
    kept = np.flatnonzero(worst_after_L <= worst_before_L * (1 + MOST_LOSS))
    return with_layers(layout, changed[kept], of_layers(part, kept)) if len(kept) else layout


def _wanted_of(layout: Layout, layers: Ints, load_LE: Floats, fleet: Fleet) -> tuple[Ints, Ints, Ints, Ints]:
    """`_wanted` for some layers, in the indices of the whole layout."""
    if len(layers) == layout.num_layers:
        return _wanted(layout, load_LE, fleet)
    part = of_layers(layout, layers)
    layer, expert, actor, gives_way = _wanted(part, load_LE[layers, : part.max_experts], fleet)
    first_L = np.searchsorted(layout.layer_R, layers) - np.searchsorted(part.layer_R, np.arange(len(layers)))
    return layers[layer], expert, actor, np.where(gives_way < 0, -1, gives_way + first_L[layer])


def _wanted(layout: Layout, load_LE: Floats, fleet: Fleet) -> tuple[Ints, Ints, Ints, Ints]:
    """Returns (layer, expert, actor, replica that gives way or -1) of each move, most needed first, one per layer."""
    every_L = np.arange(layout.num_layers)
    holds_LEA, free_LA = held(layout, fleet)
    count_LE = np.bincount(layout.expert_key_R, minlength=load_LE.size).reshape(load_LE.shape)
    unit_LE = in_fair_loads(load_LE, fleet)
    exposed_LE = on_one_node(layout, fleet).reshape(count_LE.shape) & (len(np.unique(fleet.node_A)) > 1)
    can_grow_LE = (count_LE > 0) & (count_LE < (fleet.slots_A > 0).sum())
    per_replica_LE = unit_LE / np.maximum(count_LE, 1)
    class_LE = np.where(can_grow_LE, _class(per_replica_LE > CLEARLY * HEADROOM, exposed_LE), -1)
    expert_L = (class_LE + per_replica_LE / (1 + per_replica_LE)).argmax(axis=1)
    class_L, need_L = class_LE[every_L, expert_L], per_replica_LE[every_L, expert_L]

    held_LA = holds_LEA[every_L, expert_L]
    may_LA = (fleet.slots_A > 0) & ~held_LA
    new_node_LA = ~shares_node(held_LA, fleet.node_A)
    may_LA &= new_node_LA | (class_L != EXPOSED)[:, None]

    key_R = layout.layer_R, layout.expert_R
    left_R = unit_LE[key_R] / np.maximum(count_LE[key_R] - 1, 1)  # load per replica when this one gives way
    loss_R = left_R + 0.1 * layout.share_R * unit_LE[key_R]
    may_R = (count_LE[key_R] > 1) & may_LA[layout.layer_R, layout.actor_R]
    class_R = np.where(may_R, _class(left_R > HEADROOM, leaves_one_node_R(layout, fleet)), NEVER)
    cost_R = class_R + loss_R / (1 + loss_R)
    cheapest_L = np.full(layout.num_layers, np.inf)
    np.minimum.at(cheapest_L, layout.layer_R, cost_R)
    # A layer whose experts are all cold has no replicas, and is left out below.
    gives_way_L = np.zeros(layout.num_layers, dtype=np.int64)
    cheapest = np.flatnonzero(cost_R == cheapest_L[layout.layer_R])[::-1]
    gives_way_L[layout.layer_R[cheapest]] = cheapest
    class_lost_L, lost_L = class_R[gives_way_L], loss_R[gives_way_L]

    free_L = (may_LA & (free_LA > 0)).any(axis=1)
    taste_LA = np.where(may_LA & (free_LA > 0), free_LA + 0.5 * new_node_LA, -1.0)
    actor_L = np.where(free_L, taste_LA.argmax(axis=1), layout.actor_R[gives_way_L])
    clearly_L = (class_lost_L < class_L) | ((class_lost_L == class_L) & (need_L > CLEARLY * lost_L))
    layers = np.flatnonzero((class_L >= 0) & (need_L > 0) & (free_L | clearly_L))
    layers = layers[np.lexsort((-need_L[layers], -class_L[layers]))]
    return layers, expert_L[layers], actor_L[layers], np.where(free_L, -1, gives_way_L)[layers]


def _class(too_hot: Bools, exposed: Bools) -> Ints:
    """Returns the class of need: too hot before exposed before the rest."""
    kind: Ints = np.where(too_hot, TOO_HOT, np.where(exposed, EXPOSED, 0))
    return kind
