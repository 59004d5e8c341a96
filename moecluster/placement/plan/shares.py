"""Re-solves the shares of a layout so that the most loaded actor carries as little as possible. Moves no weights.

Per layer a linear program: split each expert's load over its replicas to minimize the greatest load / speed. It is
solved, for all layers at once, as a flow of load from actors above a bound to actors below it, through the experts that
both hold, with Newton steps on the bound: the load that cannot leave a set of actors gives a new lower bound. The loop
ends when no actor is above its bound, so the answer proves its own optimality. (Newton on a parametric cut: Radzik,
"Fractional combinatorial optimization", Handbook of Combinatorial Optimization, 1998.)

Cost: a handful of maximum flows over the replicas of experts with several; near linear in those.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from moecluster.placement.layout import Bools, Fleet, Floats, Ints, Layout

RELATIVE_TOLERANCE = 1e-10
EVEN_TOLERANCE = 1e-6  # for near-equal shares: plans try many, for loads that are known far less exactly
MAX_ROUNDS = 40  # Newton ends after two to five; the rest is for rounding in the flow
EVEN_STEPS = (1.25, 1.6)  # successive caps on a replica's load, in equal shares, before uncapped steps
FLOW_UNITS = 2**29  # SciPy's flows are int32, and a pair of opposite edges may hold twice this


@dataclass(frozen=True, kw_only=True)
class SharedLoad:
    """Shares, and the load that results from them."""

    share_R: Floats
    load_LA: Floats  # of each actor, divided by its speed
    bound_L: Floats  # lower bound on the greatest load / speed; reached within the tolerance


def least_max_shares(layout: Layout, load_LE: Floats, fleet: Fleet, *, even: bool = False) -> SharedLoad:
    """Returns the shares that minimize max(load / speed), per layer, within 1e-10 of the optimum (even: 1e-6).

    Among the optima it picks one near the current shares: only load above the bound is moved. An expert without load
    keeps its shares; all shares are in [0, 1] and sum to 1 per expert.

    even: pick one near equal shares instead, ignoring the current ones: load spread equally over an expert's replicas
    suffers less when the next window differs.
    """
    problem = _Problem.of(layout, load_LE, fleet)
    tolerance = EVEN_TOLERANCE if even else RELATIVE_TOLERANCE
    start_R = 1.0 / problem.count_X[problem.expert_of_R] if even else layout.scaled_share_R
    load_R = problem.load_of_R * start_R
    bound_L = problem.first_bound_L()
    for most in EVEN_STEPS if even else ():
        excess_LA = problem.load_LA(load_R) - bound_L[:, None] * fleet.speed_A
        most_R = most * problem.load_of_R * start_R
        load_R = load_R + problem.push_R(load_R, excess_LA, _unit_L(excess_LA, bound_L, fleet, tolerance), most_R)
    for _ in range(MAX_ROUNDS):
        excess_LA = problem.load_LA(load_R) - bound_L[:, None] * fleet.speed_A
        unit_L = _unit_L(excess_LA, bound_L, fleet, tolerance)
        if np.isinf(unit_L).all():
            break
        load_R = load_R + problem.push_R(load_R, excess_LA, unit_L)
        bound_L = np.maximum(bound_L, problem.cut_bound_L(load_R, bound_L, unit_L))
    share_R = np.divide(load_R, problem.load_of_R, out=start_R, where=problem.load_of_R > 0)
    share_R = share_R / problem.sum_per_expert(share_R)[problem.expert_of_R]
    return SharedLoad(
        share_R=share_R, load_LA=problem.load_LA(problem.load_of_R * share_R) / fleet.speed_A, bound_L=bound_L
    )


def least_overflow(layout: Layout, load_LE: Floats, fleet: Fleet, bound_L: Floats) -> Floats:
    """Returns each replica's load, [R], with as little as possible above a bound that need not be reachable.

    No replica takes more than EVEN_STEPS[0] times its equal share: load that only very uneven shares could move stays
    above the bound.
    """
    problem = _Problem.of(layout, load_LE, fleet)
    load_R = problem.load_of_R / problem.count_X[problem.expert_of_R]
    excess_LA = problem.load_LA(load_R) - bound_L[:, None] * fleet.speed_A
    unit_L = _unit_L(excess_LA, bound_L, fleet, EVEN_TOLERANCE)
    return load_R + problem.push_R(load_R, excess_LA, unit_L, EVEN_STEPS[0] * load_R)


def _unit_L(excess_LA: Floats, bound_L: Floats, fleet: Fleet, tolerance: float) -> Floats:
    """Returns the load of one unit of flow in each layer; infinite where no actor is above the bound."""
    above_L = (excess_LA > tolerance * bound_L[:, None] * fleet.speed_A).any(axis=1)
    return np.where(above_L, np.maximum(excess_LA, 0.0).sum(axis=1) / FLOW_UNITS, np.inf)


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """The bipartite graphs of all layers. X: experts that have replicas, numbered across all layers."""

    speed_A: Floats
    num_layers: int
    actor_R: Ints  # layer * A + actor
    expert_of_R: Ints  # in [0, X)
    load_of_R: Floats  # load of the replica's whole expert
    layer_X: Ints
    count_X: Ints
    load_X: Floats

    @classmethod
    def of(cls, layout: Layout, load_LE: Floats, fleet: Fleet) -> "_Problem":
        key_R = layout.expert_key_R
        first_R = np.ones(len(key_R), dtype=np.bool_)
        np.not_equal(key_R[1:], key_R[:-1], out=first_R[1:])  # layouts are sorted
        key_X, expert_of_R = key_R[first_R], np.cumsum(first_R) - 1
        count_X = np.bincount(expert_of_R)
        load_X = load_LE.reshape(-1)[key_X]
        return cls(
            speed_A=fleet.speed_A,
            num_layers=layout.num_layers,
            actor_R=layout.layer_R * fleet.num_actors + layout.actor_R,
            expert_of_R=expert_of_R,
            load_of_R=load_X[expert_of_R],
            layer_X=key_X // max(layout.max_experts, 1),
            count_X=count_X,
            load_X=load_X,
        )

    def load_LA(self, load_R: Floats) -> Floats:
        size = self.num_layers * len(self.speed_A)
        load_A = np.bincount(self.actor_R, weights=load_R, minlength=size)
        return load_A.astype(np.float64, copy=False).reshape(self.num_layers, -1)

    def sum_per_expert(self, value_R: Floats | Bools) -> Floats:
        sum_X = np.bincount(self.expert_of_R, weights=value_R, minlength=len(self.load_X))
        return sum_X.astype(np.float64, copy=False)

    def first_bound_L(self) -> Floats:
        """Lower bound: the load spread evenly over all actors, and each expert's load over that expert's actors."""
        speed_R = np.tile(self.speed_A, self.num_layers)[self.actor_R]
        holds_LA = np.bincount(self.actor_R, minlength=self.num_layers * len(self.speed_A)).reshape(self.num_layers, -1)
        speed_L = np.where(holds_LA > 0, self.speed_A, 0.0).sum(axis=1)
        total_L = np.bincount(self.layer_X, weights=self.load_X, minlength=self.num_layers)
        bound_L: Floats = np.divide(total_L, speed_L, out=np.zeros(self.num_layers), where=speed_L > 0)
        np.maximum.at(bound_L, self.layer_X, self.load_X / self.sum_per_expert(speed_R))
        return bound_L

    def push_R(self, load_R: Floats, excess_LA: Floats, unit_L: Floats, most_R: Floats | None = None) -> Floats:
        """Returns the load each replica gains when as much excess as possible flows to the actors below the bound.

        unit_L: the load of one unit of flow; infinite for layers to leave unchanged. most_R: the load up to which a
        replica may gain; None for no limit.
        """
        unit_A = np.repeat(unit_L, len(self.speed_A))
        flexible_R = np.flatnonzero((self.count_X[self.expert_of_R] > 1) & np.isfinite(unit_A[self.actor_R]))
        gain_R = np.zeros(len(load_R))
        if len(flexible_R) == 0:
            return gain_R
        num_actors = excess_LA.size
        sent_A = np.maximum(excess_LA, 0.0)
        source, sink, first_expert = num_actors, num_actors + 1, num_actors + 2
        expert_node_R = first_expert + np.cumsum(np.diff(self.expert_of_R[flexible_R], prepend=-1) > 0) - 1
        over_A = np.flatnonzero((sent_A.ravel() >= unit_A) & (sent_A.ravel() > 0))
        under_A = np.flatnonzero(-excess_LA.ravel() >= unit_A)
        actor_R, unit_R = self.actor_R[flexible_R], unit_A[self.actor_R[flexible_R]]
        room_R = np.full(len(flexible_R), float(FLOW_UNITS))
        if most_R is not None:
            room_R = np.maximum(most_R[flexible_R] - load_R[flexible_R], 0.0) / unit_R
        edges = (
            (np.full(len(over_A), source), over_A, sent_A.ravel()[over_A] / unit_A[over_A]),
            (under_A, np.full(len(under_A), sink), -excess_LA.ravel()[under_A] / unit_A[under_A]),
            (actor_R, expert_node_R, load_R[flexible_R] / unit_R),
            (expert_node_R, actor_R, room_R),
        )
        tail, head, capacity = (np.concatenate(part) for part in zip(*edges, strict=True))
        size = int(expert_node_R[-1]) + 1
        whole = np.minimum(capacity, FLOW_UNITS).astype(np.int32)
        places = tail.astype(np.int32), head.astype(np.int32)  # the index type that maximum_flow requires
        flow = maximum_flow(csr_array((whole, places), shape=(size, size)), source, sink).flow
        # An expert's row lists its replicas by actor, which is the order of the layout.
        gain_R[flexible_R] = flow.data[flow.indptr[first_expert] :] * unit_R
        return np.maximum(gain_R, -load_R)

    def cut_bound_L(self, load_R: Floats, last_bound_L: Floats, unit_L: Floats) -> Floats:
        """Lower bound: the load that cannot leave the actors reachable from the remaining excess, over their speed."""
        unit_A = np.repeat(unit_L, len(self.speed_A))
        excess_LA = self.load_LA(load_R) - last_bound_L[:, None] * self.speed_A
        inside_A = excess_LA.ravel() >= unit_A  # the flow cannot represent less than a unit
        gives_R = load_R >= unit_A[self.actor_R]
        num_inside = 0
        while (count := int(inside_A.sum())) > num_inside:
            num_inside = count
            reached_X = self.sum_per_expert(inside_A[self.actor_R] & gives_R) > 0
            inside_A[self.actor_R[reached_X[self.expert_of_R]]] = True
        captive_X = self.sum_per_expert(~inside_A[self.actor_R]) == 0
        load_L = np.bincount(self.layer_X, weights=self.load_X * captive_X, minlength=self.num_layers)
        speed_L = np.where(inside_A.reshape(excess_LA.shape), self.speed_A, 0.0).sum(axis=1)
        bound_L: Floats = np.divide(load_L, speed_L, out=np.zeros(self.num_layers), where=speed_L > 0)
        return bound_L
