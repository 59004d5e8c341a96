"""Packs replicas of similar load, heaviest first, each on the actor that ends up least loaded, in all layers at once;
or fills the actors of one layer to exactly their fair load, by splitting at most one expert per actor.

The latter is McNaughton's wrap-around rule (Management Science, 1959) for actors of limited slots: over the experts
sorted by load, slide a window of k neighbors until it holds the actor's fair load; split its heaviest expert there, and
return the remainder to the pool. So A actors need at most A - 1 replicas more than there are experts, and carry exactly
their fair loads, if that many slots are free and the loads are not too similar.
"""

from bisect import insort

import numpy as np

from moecluster.placement.layout import Fleet, Floats, Ints, Layout, make_layout
from moecluster.placement.plan.replica_counts import planned_counts

WHOLE = 1e-9  # a part smaller than this fraction of an actor's fair load is rounding, not a replica


def exact_fill(load_E: Floats, fair_A: Floats, slots_A: Ints, node_A: Ints) -> list[tuple[int, int, float]] | None:
    """Returns (expert, actor, load) of every replica, or None if no exact fill is found. [E], [A], [A], [A].

    fair_A: each actor's target load; they sum to load_E's sum. Actors without slots have 0.
    """
    pool = sorted((float(load), expert) for expert, load in enumerate(load_E))
    actors = [a for a in _order(fair_A, slots_A, node_A) if slots_A[a] > 0]
    room = sum(int(slots_A[a]) - 1 for a in actors)  # experts that can leave the pool before the last actor
    placed: list[tuple[int, int, float]] = []
    for actor in actors[:-1]:
        slots = int(slots_A[actor])
        room -= slots - 1
        window = _window([load for load, _ in pool], float(fair_A[actor]), max(len(pool) - room, 1), slots)
        if window is None:
            return None
        first, last = window
        heaviest, split = pool[last]
        fair = float(fair_A[actor])
        part = fair - sum(load for load, _ in pool[first:last])
        placed += [(expert, actor, load) for load, expert in pool[first:last]]
        del pool[first : last + 1]
        if heaviest - part <= WHOLE * fair:
            placed.append((split, actor, heaviest))
        elif part <= WHOLE * fair:
            insort(pool, (heaviest, split))
        else:
            placed.append((split, actor, part))
            insort(pool, (heaviest - part, split))
    if len(pool) > slots_A[actors[-1]]:
        return None
    return placed + [(expert, actors[-1], load) for load, expert in pool]


def _order(fair_A: Floats, slots_A: Ints, node_A: Ints) -> list[int]:
    """Most load per slot first; ties take turns between nodes, so that an expert's parts are on several nodes."""
    by_node = np.argsort(node_A, kind="stable")
    turn_A = np.empty(len(node_A), dtype=np.int64)
    turn_A[by_node] = np.arange(len(node_A)) - np.searchsorted(node_A[by_node], node_A[by_node])
    order_A: list[int] = np.lexsort((turn_A, -fair_A / np.maximum(slots_A, 1))).tolist()
    return order_A


def _window(loads: list[float], fair: float, fewest: int, most: int) -> tuple[int, int] | None:
    """Returns [first, last] of the widest window whose last expert is to be split; None if none fits."""
    sums = np.concatenate(([0.0], np.cumsum(loads)))
    for size in range(min(most, len(loads)), fewest - 1, -1):
        totals = sums[size:] - sums[:-size]  # ascending, since the loads are
        end = int(np.searchsorted(totals, fair))
        without_last = sums[end + size - 1] - sums[end] if end < len(totals) else np.inf
        if end < len(totals) and without_last <= fair:
            return end, end + size - 1
    return None


def packed(load_LE: Floats, num_experts_L: Ints, fleet: Fleet) -> Layout:
    """Returns a layout of `planned_counts`, with equal shares (LPT: Graham, 1969, with slots).

    The slots must suffice for all experts. An actor takes an expert at most once, and an expert's second replica goes
    to another node if one has a slot; a replica that fits nowhere is left out.
    """
    num_layers, max_experts = load_LE.shape
    count_LE = planned_counts(load_LE, num_experts_L, fleet)
    part_LE = load_LE / np.maximum(count_LE, 1)
    expert_LS = _heaviest_first(part_LE, count_LE)
    load_LA = np.zeros((num_layers, fleet.num_actors))
    free_LA = np.tile(fleet.slots_A, (num_layers, 1))
    holds_LEA = np.zeros((num_layers, max_experts, fleet.num_actors), dtype=np.bool_)
    missing_L = num_experts_L.copy()  # experts not placed yet: a slot must remain for each
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
    """Returns the expert of each replica, by falling load, [L, most replicas of a layer]; -1 beyond a layer's own."""
    num_layers, max_experts = part_LE.shape
    total_L = count_LE.sum(axis=1)
    key_R = np.repeat(np.arange(num_layers * max_experts), count_LE.ravel())
    layer_R = key_R // max_experts
    order_R = np.lexsort((key_R, -part_LE.ravel()[key_R], layer_R))
    expert_LS = np.full((num_layers, int(total_L.max(initial=0))), -1)
    place_R = np.arange(len(key_R)) - (np.cumsum(total_L) - total_L)[layer_R]
    expert_LS[layer_R, place_R] = key_R[order_R] % max_experts
    return expert_LS
