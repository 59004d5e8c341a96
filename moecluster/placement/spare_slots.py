"""What slots are spent on that balance does not need: load that will change, and nodes that will fail."""

import numpy as np

from moecluster.placement.layout import Bools, Fleet, Floats, Ints, Layout, with_added
from moecluster.placement.replica_counts import in_fair_loads, urgency


def with_spare_slots_used(layout: Layout, load_LE: Floats, fleet: Fleet) -> Layout:
    """The layout with a replica more in every free slot where one can stand, of share 0.

    Experts in the order of `replica_counts.urgency`. A new replica goes to an actor with most free slots, by
    preference on a node without the expert, then where the least load can be shared so far.
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
    """Which actor holds which expert, [L, E, A], and the free slots, [L, A]."""
    holds_LEA = np.zeros((layout.num_layers, layout.max_experts, fleet.num_actors), dtype=np.bool_)
    holds_LEA[layout.layer_R, layout.expert_R, layout.actor_R] = True
    key_R = layout.layer_R * fleet.num_actors + layout.actor_R
    held_LA = np.bincount(key_R, minlength=layout.num_layers * fleet.num_actors).reshape(layout.num_layers, -1)
    return holds_LEA, np.maximum(fleet.slots_A - held_LA, 0)


def on_one_node(layout: Layout, fleet: Fleet) -> Bools:
    """Of each expert that stands, by its key, whether one node holds all its replicas: [L * E]."""
    key_R, node_R = layout.expert_key_R, fleet.node_A[layout.actor_R]
    node_X = np.full(layout.num_layers * layout.max_experts, -1)
    node_X[key_R] = node_R  # of some replica
    alone_X: Bools = node_X >= 0
    alone_X[key_R[node_R != node_X[key_R]]] = False
    return alone_X


def leaves_one_node_R(layout: Layout, fleet: Fleet) -> Bools:
    """Of each replica, whether its expert would stand on one node only without it, though there are several nodes."""
    nodes, place_A = np.unique(fleet.node_A, return_inverse=True)
    key_R = layout.expert_key_R * len(nodes) + place_A[layout.actor_R]
    count_XN = np.bincount(key_R, minlength=layout.num_layers * layout.max_experts * len(nodes))
    nodes_X = np.count_nonzero(count_XN.reshape(-1, len(nodes)), axis=1)  # of each expert key
    left_R = nodes_X[layout.expert_key_R] - (count_XN[key_R] == 1)
    leaves: Bools = (left_R <= 1) & (len(nodes) > 1)
    return leaves


def shares_node(holds: Bools, node_A: Ints) -> Bools:
    """[n, A] -> [n, A]: whether an actor's node has an actor that holds."""
    _, place_A = np.unique(node_A, return_inverse=True)
    on_node = np.zeros((len(holds), int(place_A.max(initial=0)) + 1), dtype=np.bool_)
    row, actor = np.nonzero(holds)
    on_node[row, place_A[actor]] = True
    shares: Bools = on_node[:, place_A]
    return shares
