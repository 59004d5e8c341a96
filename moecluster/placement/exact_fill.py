"""Filling actors of one layer to exactly their fair load, by splitting at most one expert an actor.

McNaughton's wrap-around rule (Management Science, 1959) for actors of limited slots: of the experts sorted by load, a
window of k neighbours is slid until it holds the actor's fair load; the heaviest of it is split there, and what is left
of it goes back among the others. So A actors need at most A - 1 replicas more than there are experts, and come out
equal to the last token, where that many slots are free and the loads are not too much alike.
"""

from bisect import insort

import numpy as np

from moecluster.placement.layout import Floats, Ints

WHOLE = 1e-9  # a part smaller than this fraction of an actor's fair load is rounding, and no replica


def exact_fill(load_E: Floats, fair_A: Floats, slots_A: Ints, node_A: Ints) -> list[tuple[int, int, float]] | None:
    """(expert, actor, load) of every replica, or None where the rule does not come out even. [E], [A], [A], [A].

    fair_A: the load that each actor is to have, with the sum of load_E; actors without slots have none.
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
    """Most load per slot first; actors alike in that in turns of the nodes, so that parts stand on several."""
    by_node = np.argsort(node_A, kind="stable")
    turn_A = np.empty(len(node_A), dtype=np.int64)
    turn_A[by_node] = np.arange(len(node_A)) - np.searchsorted(node_A[by_node], node_A[by_node])
    order_A: list[int] = np.lexsort((turn_A, -fair_A / np.maximum(slots_A, 1))).tolist()
    return order_A


def _window(loads: list[float], fair: float, fewest: int, most: int) -> tuple[int, int] | None:
    """[first, last] of the neighbours of which the last is to be split: as many as can be, to spare the slots."""
    sums = np.concatenate(([0.0], np.cumsum(loads)))
    for size in range(min(most, len(loads)), fewest - 1, -1):
        totals = sums[size:] - sums[:-size]  # growing, as the loads are
        end = int(np.searchsorted(totals, fair))
        without_last = sums[end + size - 1] - sums[end] if end < len(totals) else np.inf
        if end < len(totals) and without_last <= fair:
            return end, end + size - 1
    return None
