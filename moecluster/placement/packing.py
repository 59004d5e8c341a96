"""Packing the replicas of one layer where no exact fill exists: heaviest first, each on the actor that it loads least."""

import numpy as np

from moecluster.placement.layout import Fleet, Floats
from moecluster.placement.replica_counts import minimax_counts


def packed(load_E: Floats, fleet: Fleet) -> list[tuple[int, int, float]]:
    """(expert, actor, load) of each replica; the slots suffice for every expert.

    Replicas by least-worst counts, alike in load (LPT: Graham, 1969, with slots). An actor takes an expert once, and the
    second replica goes to another node where one has a slot; a replica that fits nowhere is left out.
    """
    num_experts = len(load_E)
    num_used = int((fleet.slots_A > 0).sum())
    count_E = minimax_counts(load_E[None], np.array([num_experts]), int(fleet.slots_A.sum()), num_used)[0]
    part_E = load_E / count_E
    expert_R = np.repeat(np.arange(num_experts), count_E)
    load_A = np.zeros(fleet.num_actors)
    free_A = fleet.slots_A.copy()
    left = num_experts  # experts that stand nowhere yet: a slot must remain for each
    actors_of: list[list[int]] = [[] for _ in range(num_experts)]
    for expert in expert_R[np.argsort(-part_E[expert_R], kind="stable")].tolist():
        mine = actors_of[expert]
        if mine and free_A.sum() <= left:
            continue
        open_A = free_A > 0
        open_A[mine] = False
        if len(mine) == 1 and (elsewhere_A := open_A & (fleet.node_A != fleet.node_A[mine[0]])).any():
            open_A = elsewhere_A
        if not open_A.any():
            continue
        actor = int(np.where(open_A, (load_A + part_E[expert]) / fleet.speed_A, np.inf).argmin())
        left -= not mine
        mine.append(actor)
        load_A[actor] += part_E[expert]
        free_A[actor] -= 1
    return [(expert, a, load_E[expert] / len(mine)) for expert, mine in enumerate(actors_of) for a in mine]
