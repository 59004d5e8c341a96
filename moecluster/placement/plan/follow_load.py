"""One round of moves for actors with one replica of a layer: shares cannot even out such an actor's load, so the number
of an expert's replicas must follow its load.

Each actor of an expert then bears the expert's load / (summed speed of its actors), whatever the shares. Replicas go
one by one to the expert that bears most, on an empty actor or on an actor taken from the expert that would bear least
without it: the replication step of EPLB, but from the current layout. Cost: near linear in the replicas moved and in E.
"""

import numpy as np

from moecluster.placement.layout import Bools, Fleet, Floats, Ints, Layout, with_added, without

CLEARLY = 1.001  # the taking expert must bear this times what the giving expert bears afterwards
UNCOVERED = 1.05  # penalty factor for giving away the second-last replica


def recounted(layout: Layout, load_LE: Floats, fleet: Fleet, goal_L: Floats, most_moves_L: Ints) -> Layout:
    """Returns the layout after one round; new replicas have share 0, and dropped replicas' shares are not reassigned.

    goal_L: load / speed at or below which an expert needs no more replicas. most_moves_L: replicas that may be added.
    Experts with a replica on an actor that holds others of the layer are left to shares and other moves.
    """
    alone_R = _alone_R(layout, fleet)
    if not alone_R.any():
        return layout
    dropped_R = np.zeros(layout.num_replicas, dtype=np.bool_)
    added: list[tuple[int, int, int]] = []
    first_L = np.searchsorted(layout.layer_R, np.arange(layout.num_layers + 1))
    for layer in np.flatnonzero(most_moves_L > 0).tolist():
        mine = slice(first_L[layer], first_L[layer + 1])
        counts = _Counts(fleet, layout.expert_R[mine], layout.actor_R[mine], alone_R[mine], load_LE[layer])
        counts.follow(float(goal_L[layer]), int(most_moves_L[layer]))
        dropped_R[mine] = counts.dropped_R
        added += [(layer, expert, actor) for expert, actor in counts.added]
    if not added:
        return layout
    layer_N, expert_N, actor_N = np.array(added, dtype=np.int64).T
    return with_added(without(layout, dropped_R), layer_N, expert_N, actor_N)


def _alone_R(layout: Layout, fleet: Fleet) -> Bools:
    """Returns which replicas belong to experts whose actors hold nothing else of the layer."""
    place_R = layout.layer_R * fleet.num_actors + layout.actor_R
    crowded_R = np.bincount(place_R)[place_R] > 1
    crowded_X = np.bincount(layout.expert_key_R, weights=crowded_R) > 0
    alone_R: Bools = ~crowded_X[layout.expert_key_R]
    return alone_R


class _Counts:
    """One layer while its replica counts follow the load. R: its current replicas, an expert's next to each other."""

    def __init__(self, fleet: Fleet, expert_R: Ints, actor_R: Ints, alone_R: Bools, load_E: Floats) -> None:
        self.dropped_R: Bools = np.zeros(len(expert_R), dtype=np.bool_)
        self.added: list[tuple[int, int]] = []
        self._expert_R, self._actor_R, self._load_E = expert_R, actor_R, load_E
        self._speed_A, self._node_A = fleet.speed_A, fleet.node_A
        held_A = np.bincount(actor_R, minlength=fleet.num_actors)
        self._empty = np.flatnonzero((held_A == 0) & (fleet.slots_A > 0)).tolist()
        self._empty.sort(key=lambda actor: fleet.speed_A[actor])  # the fastest is popped first
        alone_E = np.zeros(len(load_E), dtype=np.bool_)
        alone_E[expert_R[alone_R]] = True
        self._count_E = np.where(alone_E, np.bincount(expert_R, minlength=len(load_E)), 0)
        self._speed_E = np.bincount(expert_R, weights=fleet.speed_A[actor_R], minlength=len(load_E))
        self._bears_E = np.where(alone_E, load_E / np.where(alone_E, self._speed_E, 1.0), 0.0)
        self._least_E = np.full(len(load_E), np.inf)  # speed of the slowest actor that may still be given away
        np.minimum.at(self._least_E, expert_R, fleet.speed_A[actor_R])
        self._left_E = np.full(len(load_E), np.inf)
        for expert in np.flatnonzero(alone_E).tolist():
            self._left_E[expert] = self._left(expert)

    def follow(self, goal: float, most_moves: int) -> None:
        """Gives replicas to the expert that bears most, until none bears more than the goal."""
        while len(self.added) < most_moves:
            taker = int(self._bears_E.argmax())
            bears = self._bears_E[taker]
            if bears <= goal:
                return
            if self._empty:
                self._take(taker, self._empty.pop())
                continue
            giver = int(self._left_E.argmin())
            if giver == taker or not bears > CLEARLY * self._left_E[giver]:
                return
            self._take(taker, self._give(giver, taker))

    def _left(self, expert: int) -> float:
        """Returns what each actor of the expert would bear without the slowest one that may be given away."""
        if self._count_E[expert] < 2 or not np.isfinite(self._least_E[expert]):
            return np.inf
        left = self._load_E[expert] / (self._speed_E[expert] - self._least_E[expert])
        return float(left * (UNCOVERED if self._count_E[expert] == 2 else 1.0))

    def _give(self, giver: int, taker: int) -> int:
        """Drops one of the giver's replicas on its slowest actors, by preference on a node without the taker.

        Returns the freed actor.
        """
        first, last = np.searchsorted(self._expert_R, (giver, giver + 1))
        here = np.flatnonzero(~self.dropped_R[first:last]) + first
        slowest = here[self._speed_A[self._actor_R[here]] == self._least_E[giver]]
        nodes = self._node_A[self._actor_R[self._expert_R == taker]]
        apart = ~np.isin(self._node_A[self._actor_R[slowest]], nodes)
        replica = int(slowest[apart.argmax()])
        self.dropped_R[replica] = True
        rest = here[here != replica]
        speed = self._speed_A[self._actor_R[replica]]
        self._least_E[giver] = self._speed_A[self._actor_R[rest]].min(initial=np.inf)
        self._changed(giver, -1, -float(speed))
        return int(self._actor_R[replica])

    def _take(self, taker: int, actor: int) -> None:
        self.added.append((taker, actor))
        self._changed(taker, 1, float(self._speed_A[actor]))

    def _changed(self, expert: int, replicas: int, speed: float) -> None:
        self._count_E[expert] += replicas
        self._speed_E[expert] += speed
        self._bears_E[expert] = self._load_E[expert] / self._speed_E[expert]
        # An expert that took a replica in this round gives none, or replicas would go back and forth.
        self._left_E[expert] = np.inf if replicas > 0 else self._left(expert)
