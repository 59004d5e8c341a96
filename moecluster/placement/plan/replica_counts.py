"""How many replicas each expert gets, and a bound on how good any placement with these slots can be."""

import numpy as np

from moecluster.placement.layout import Bools, Fleet, Floats, Ints

HEADROOM = 0.25  # replicas of at most this fraction of an actor's fair load let shares follow the load


def minimax_counts(load_LE: Floats, num_experts_L: Ints, slots: int, most: int) -> Ints:
    """Returns the counts that minimize max(load / count), [L, E]: greedily one more for the greatest load per replica.

    slots: the sum of each layer's counts, as far as `most` replicas of each expert allow it. The greedy choice is
    optimal, and is the replication step of DeepSeek's EPLB.
    """
    num_layers, max_experts = load_LE.shape
    exists_LE = np.arange(max_experts) < num_experts_L[:, None]
    count_LE = exists_LE.astype(np.int64)
    rank_LE = np.where(exists_LE & (most > 1), load_LE, -1.0)
    left_L = np.minimum(slots, num_experts_L * most) - count_LE.sum(axis=1)
    every_L = np.arange(num_layers)
    for step in range(int(left_L.max(initial=0))):
        chosen_L = rank_LE.argmax(axis=1)
        growing = every_L[left_L > step]
        chosen = chosen_L[growing]
        count_LE[growing, chosen] += 1
        count = count_LE[growing, chosen]
        rank_LE[growing, chosen] = np.where(count < most, load_LE[growing, chosen] / count, -1.0)
    return count_LE


def planned_counts(load_LE: Floats, num_experts_L: Ints, fleet: Fleet) -> Ints:
    """Returns counts that use every slot, [L, E]: what balance needs first, then second replicas, hottest first."""
    slots, most = int(fleet.slots_A.sum()), int((fleet.slots_A > 0).sum())
    exists_LE = np.arange(load_LE.shape[1]) < num_experts_L[:, None]
    count_LE = exists_LE.astype(np.int64)
    unit_LE = in_fair_loads(load_LE, fleet)
    left_L = np.minimum(slots, num_experts_L * most) - num_experts_L
    every_L = np.arange(len(load_LE))
    for step in range(int(left_L.max(initial=0))):
        growing = every_L[left_L > step]
        count = count_LE[growing]
        chosen = urgency(unit_LE[growing], count, count == 1, exists_LE[growing] & (count < most)).argmax(axis=1)
        count_LE[growing, chosen] += 1
    return count_LE


def in_fair_loads(load_LE: Floats, fleet: Fleet) -> Floats:
    """Returns the loads in units of the average load of an actor with slots, per layer."""
    fair_L = load_LE.sum(axis=1, keepdims=True) / max(int((fleet.slots_A > 0).sum()), 1)
    units: Floats = np.divide(load_LE, fair_L, out=np.zeros_like(load_LE), where=fair_L > 0)
    return units


def urgency(unit_LE: Floats, count_LE: Ints, exposed_LE: Bools, may_LE: Bools) -> Floats:
    """Returns the priority of each expert for one more replica, highest first, -1 where it cannot have one: [L, E].

    First experts with more than HEADROOM of a fair load per replica, then those that the loss of one node would take
    (exposed), then the rest; by load per replica within each class.
    """
    per_replica_LE = unit_LE / np.maximum(count_LE, 1)
    top = per_replica_LE.max(initial=0.0) + 1.0
    order_LE = per_replica_LE + np.where(per_replica_LE > HEADROOM, 2 * top, np.where(exposed_LE, top, 0.0))
    return np.where(may_LE, order_LE, -1.0)


def least_worst_load_L(load_LE: Floats, num_experts_L: Ints, fleet: Fleet) -> Floats:
    """Returns a lower bound on the greatest load / speed of an actor, for any placement on these slots: [L].

    The minimum, over replica counts, of max(mean load, max load / count); with uneven speeds, an expert of c replicas
    is at best on the c fastest actors.
    """
    speed_A = np.sort(fleet.speed_A[fleet.slots_A > 0])[::-1]
    slots = int(fleet.slots_A.sum())
    reach_C = np.cumsum(speed_A)  # speed of the c + 1 fastest actors
    bound_L: Floats = load_LE.sum(axis=1) / reach_C[-1]
    hottest_L = load_LE.max(axis=1, initial=0.0)
    np.maximum(bound_L, hottest_L / reach_C[-1], out=bound_L)
    high_L = np.maximum(hottest_L / reach_C[0], bound_L)
    low_L = bound_L
    for _ in range(50):  # bisection on whether a load per speed this low fits the slots
        middle_L = (low_L + high_L) / 2
        wanted_LE = np.divide(load_LE, middle_L[:, None], out=np.zeros_like(load_LE), where=middle_L[:, None] > 0)
        count_LE = np.maximum(np.searchsorted(reach_C, wanted_LE * (1 - 1e-12)) + 1, 1)
        fits_L = (count_LE * (np.arange(load_LE.shape[1]) < num_experts_L[:, None])).sum(axis=1) <= slots
        low_L, high_L = np.where(fits_L, low_L, middle_L), np.where(fits_L, middle_L, high_L)
    least_L: Floats = np.maximum(bound_L, low_L)
    return least_L
