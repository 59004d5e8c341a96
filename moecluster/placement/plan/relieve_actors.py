"""One round of single moves: each actor above the bound gives one of its experts a replica on an actor with room."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moecluster.placement.layout import Bools, Fleet, Floats, Ints, Layout, with_added, without
from moecluster.placement.plan.shares import least_overflow

EXPERTS_TRIED = 4  # of an actor above the bound, the heaviest
LEAST_RELIEF = 0.02  # of the excess above the bound: the least that a move must take away
PASSED_ON = 0.5  # of an actor's divided load: what it is assumed to pass to other replicas in exchange for more
UNCOVERED = 0.05  # of an expert's load: the cost of leaving it with one replica
NEW_NODE = 0.02  # relative preference for a node without the expert


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Goals and limits of a round. All layers are those of the layout at hand."""

    bound_L: Floats  # load / speed that actors are to come down to
    tolerance: float  # relative excess above the bound that is tolerated
    most_moves_L: Ints  # replicas that may be added; 0: the layer is left unchanged
    round_moves_L: Ints  # moves after which the round ends; the next round sees the re-solved shares


def relieved(layout: Layout, load_LE: Floats, fleet: Fleet, wanted: Wanted) -> Layout:
    """Returns the layout after one round; new replicas have share 0, and dropped replicas' shares are not reassigned.

    An actor above the bound (after shares have done what they can) gives the expert that relieves it most a replica on
    the actor with the most room, in a free slot or in place of the replica least needed there. Where no replica can be
    spared, two experts swap places.
    """
    load_R = least_overflow(layout, load_LE, fleet, wanted.bound_L)
    dropped_R = np.zeros(layout.num_replicas, dtype=np.bool_)
    added: list[tuple[int, int, int]] = []
    first_L = np.searchsorted(layout.layer_R, np.arange(layout.num_layers + 1))
    for layer in np.flatnonzero(wanted.most_moves_L > 0).tolist():
        mine = slice(first_L[layer], first_L[layer + 1])
        board = _Board(
            fleet,
            layout.expert_R[mine],
            layout.actor_R[mine],
            load_R[mine],
            load_LE[layer],
            wanted.bound_L[layer] * fleet.speed_A,
        )
        board.relieve(wanted.tolerance, int(wanted.most_moves_L[layer]), int(wanted.round_moves_L[layer]))
        dropped_R[mine] = board.dropped_R
        added += [(layer, expert, actor) for expert, actor in board.added]
    if not added:
        return layout
    layer_N, expert_N, actor_N = np.array(added, dtype=np.int64).T
    return with_added(without(layout, dropped_R), layer_N, expert_N, actor_N)


class _Board:
    """One layer while its actors are relieved one after the other. R: its current replicas."""

    def __init__(
        self,
        fleet: Fleet,
        expert_R: Ints,
        actor_R: Ints,
        load_R: Floats,
        load_E: Floats,
        limit_A: Floats,
    ) -> None:
        self.dropped_R: Bools = np.zeros(len(expert_R), dtype=np.bool_)
        self.added: list[tuple[int, int]] = []
        self._fleet, self._load_E = fleet, load_E
        self._expert_R, self._actor_R, self._load_R = expert_R, actor_R, load_R
        self._limit_A = limit_A
        self._holds_EA = np.zeros((len(load_E), fleet.num_actors), dtype=np.bool_)
        self._holds_EA[expert_R, actor_R] = True
        self._over_A = np.bincount(actor_R, weights=load_R, minlength=fleet.num_actors) - limit_A
        self._free_A = fleet.slots_A - self._holds_EA.sum(axis=0)
        self._fixed_R = np.zeros(len(expert_R), dtype=np.bool_)  # replicas of experts already moved in this round

    def relieve(self, tolerance: float, most_moves: int, round_moves: int) -> None:
        """Adds, drops and exchanges replicas, most loaded actor first, at most one change per actor."""
        worst_first = np.argsort(-self._over_A / self._fleet.speed_A, kind="stable")
        for actor in worst_first.tolist():
            done = self._over_A[actor] <= tolerance * self._limit_A[actor]
            if done or len(self.added) >= min(most_moves, round_moves):
                break
            if not self._replicate(actor) and len(self.added) + 2 <= most_moves:
                self._exchange(actor)

    def _replicate(self, actor: int) -> bool:
        excess = self._over_A[actor]
        drop_A, cost_A = self._least_needed()
        room_A = np.minimum(self._room_A(), excess - cost_A)
        room_A[actor] = -np.inf
        best = (LEAST_RELIEF * excess, -1, -1)
        for expert, load in self._heaviest(actor):
            relief_A = np.minimum(room_A, load) * self._taste_A(expert)
            relief_A[self._holds_EA[expert]] = -np.inf
            target = int(relief_A.argmax())
            best = max(best, (float(relief_A[target]), expert, target))
        relief, expert, target = best
        if expert < 0:
            return False
        if self._free_A[target] <= 0:
            self._drop(int(drop_A[target]))
        self._add(expert, target)
        self._over_A[actor] -= relief
        self._over_A[target] += relief
        return True

    def _exchange(self, actor: int) -> None:
        """Swaps a heavier replica of this actor with a lighter one of another actor."""
        stands_R = ~self.dropped_R & ~self._fixed_R
        here = np.flatnonzero(stands_R & (self._actor_R == actor))
        there = np.flatnonzero(stands_R & (self._over_A[self._actor_R] < 0))
        if len(here) == 0 or len(there) == 0:
            return
        shift = self._load_R[here][:, None] - self._load_R[there]
        gain = np.minimum(np.minimum(shift, self._over_A[actor]), -self._over_A[self._actor_R[there]])
        clash = self._holds_EA[self._expert_R[here][:, None], self._actor_R[there]]
        clash |= self._holds_EA[self._expert_R[there], actor]
        gain = np.where(clash, -np.inf, gain)
        row, column = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[row, column] <= LEAST_RELIEF * self._over_A[actor]:
            return
        heavy, light = int(here[row]), int(there[column])
        other = int(self._actor_R[light])
        for replica in (heavy, light):
            self._drop(replica)
        self._add(int(self._expert_R[heavy]), other)
        self._add(int(self._expert_R[light]), actor)
        self._over_A[actor] -= shift[row, column]
        self._over_A[other] += shift[row, column]

    def _room_A(self) -> Floats:
        """Returns the load an actor can take: up to the bound, plus load that it can pass on to others below theirs."""
        below = float(np.maximum(-self._over_A, 0.0).sum())
        divided_R = (self._holds_EA.sum(axis=1)[self._expert_R] > 1) & ~self.dropped_R
        divided_A = np.bincount(self._actor_R, weights=self._load_R * divided_R, minlength=len(self._over_A))
        room_A = np.negative(self._over_A) + PASSED_ON * np.minimum(divided_A, below)
        room: Floats = np.where(self._over_A < 0, room_A, -np.inf).astype(np.float64, copy=False)
        return room

    def _heaviest(self, actor: int) -> Iterator[tuple[int, float]]:
        """Yields (expert, its load on the actor), heaviest first."""
        mine = np.flatnonzero((self._actor_R == actor) & ~self.dropped_R)
        for replica in mine[np.argsort(-self._load_R[mine], kind="stable")][:EXPERTS_TRIED].tolist():
            yield int(self._expert_R[replica]), float(self._load_R[replica])

    def _least_needed(self) -> tuple[Ints, Floats]:
        """Returns for each actor the replica to drop for a new one, and its cost; a free slot costs nothing."""
        drop_A = np.full(self._fleet.num_actors, -1)
        cost_A = np.where(self._free_A > 0, 0.0, np.inf)
        count_E = self._holds_EA.sum(axis=1)
        spare = np.flatnonzero((count_E[self._expert_R] > 1) & ~self.dropped_R & ~self._fixed_R)
        expert_S = self._expert_R[spare]
        cost_S = self._load_R[spare] + 1e-3 * self._load_E[expert_S] / count_E[expert_S]
        cost_S += np.where(count_E[expert_S] == 2, UNCOVERED * self._load_E[expert_S], 0.0)
        dearest_first = np.argsort(-cost_S, kind="stable")
        actor_S = self._actor_R[spare][dearest_first]
        drop_A[actor_S] = spare[dearest_first]  # the last assignment, the cheapest, stays
        full_A = (self._free_A <= 0) & (drop_A >= 0)
        cheapest_A = np.full(len(cost_A), np.inf)
        cheapest_A[actor_S] = cost_S[dearest_first]
        return drop_A, np.where(full_A, cheapest_A, cost_A)

    def _taste_A(self, expert: int) -> Floats:
        """Returns factors near 1: an expert's preference among actors with similar room."""
        nodes = self._fleet.node_A[self._holds_EA[expert]]
        return np.where(np.isin(self._fleet.node_A, nodes), 1.0, 1.0 + NEW_NODE)

    def _drop(self, replica: int) -> None:
        expert, actor = self._expert_R[replica], self._actor_R[replica]
        self.dropped_R[replica] = True
        self._holds_EA[expert, actor] = False
        self._free_A[actor] += 1

    def _add(self, expert: int, actor: int) -> None:
        self.added.append((expert, actor))
        self._holds_EA[expert, actor] = True
        self._free_A[actor] -= 1
        self._fixed_R |= self._expert_R == expert  # the new replica's load is known only after the next solve of shares
