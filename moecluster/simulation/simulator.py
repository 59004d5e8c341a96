"""Simulates a cluster: a discrete-event model of thousands of actors under any policy.

Between events nothing changes, and tokens flow as in fluid_queue.py. Events have exact times: the end of a window, a
death, its detection, an actor's return, and the arrival of a layer's last copy. Experts are copied make-before-break
over links that carry one copy in and one out at a time; a layer's new placement takes effect when all its copies have
arrived, and until then those links have less bandwidth for rows. A death aborts the changes in progress: layers that
have arrived stay. The first plan is made for the first window's load and is the same under every policy; tokens arrive
once it is in place, and from then on the policy decides. Decisions take no simulated time, so equal seeds give equal
runs; their real time is measured separately.
"""

import dataclasses
import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic

import numpy as np

from moecluster.placement.layout import Bools, Fleet, Floats, Layout, moved_bytes
from moecluster.placement.load.window import CounterReading, ExponentialWindow
from moecluster.placement.names import mean_balancedness
from moecluster.placement.plan.cold import cold_plan
from moecluster.placement.policy.interface import USUAL_BURST, Observation, Policy, StateT, decision_of
from moecluster.simulation.costs import Costs
from moecluster.simulation.fluid_queue import FluidQueue, Served, StepCosts, step_costs
from moecluster.simulation.layouts import contiguous_layout, hosted_experts_LE, layers_taken, surviving
from moecluster.simulation.scenario import Scenario, SimulatedDecision, SimulatedWindow
from moecluster.simulation.synthetic_load import SyntheticLoads, WindowLoad
from moecluster.simulation.transfers import STORE, schedule

ROUTER = "router"
_HOUR_S = 3600.0


@dataclass(kw_only=True)
class _Tally:
    """Sums over one window."""

    served: Served = field(default_factory=Served)
    tokens: float = 0.0  # that arrived
    balancedness: float = 0.0  # integrals over time
    judged_s: float = 0.0  # time during which balancedness was defined
    availability: float = 0.0
    deaths: int = 0
    decisions: list[SimulatedDecision] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Conditions:
    """Values that are constant until the next event."""

    costs: StepCosts
    available: float
    balancedness: float | None  # None: no replica carries load


class Simulator(Generic[StateT]):
    """Runs one scenario. clock: times the decisions. Raises ResourceError for fewer slots than experts."""

    def __init__(
        self,
        scenario: Scenario,
        fleet: Fleet,
        loads: SyntheticLoads,
        policy: Policy[StateT],
        costs: Costs,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        shape = loads.shape
        self._scenario = scenario
        self._fleet = fleet
        self._loads = loads
        self._top_k = shape.top_k
        self._policy = policy
        self._state = policy.first_state()
        self._costs = costs
        self._clock = clock
        self._rng = np.random.default_rng(scenario.seed)
        self._alive_A: Bools = np.ones(fleet.num_actors, dtype=np.bool_)
        self._layout = contiguous_layout(np.full(shape.num_layers, shape.num_experts, dtype=np.int64), fleet)
        self._queue = FluidQueue(scenario.most_tokens_per_actor * fleet.num_actors)
        self._window = ExponentialWindow(
            dict.fromkeys(range(shape.num_layers), shape.num_experts), half_life_s=scenario.load_half_life_s
        )
        self._counters_LE = np.zeros((shape.num_layers, shape.num_experts), dtype=np.int64)
        self._observe_s = 0.0

        self._now_s = 0.0
        self._load: WindowLoad
        self._conditions: _Conditions | None = None  # None: outdated by a change
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()  # events of equal time run in the order in which they were scheduled
        self._link_busy_until_s_A: Floats = np.zeros(fleet.num_actors)
        self._operation: int | None = None  # number of the change in progress
        self._operations = itertools.count()
        self._put_off: str | None = None  # cause of a decision that waits for the change in progress
        self._decided = False
        self._open = False  # tokens arrive once the first plan is in place
        self._tally = _Tally()

    def run(self) -> Iterator[SimulatedWindow]:
        """Yields the windows in order."""
        self._read_counters()
        for actor in range(self._fleet.num_actors):
            self._await_death(actor)
        for number, load in enumerate(self._loads, start=1):
            self._load, self._conditions = load, None
            while self._events and self._events[0][0] <= load.time_s:
                time_s, _, happens = heapq.heappop(self._events)
                self._advance(time_s)
                happens()
                self._conditions = None
            self._advance(load.time_s)
            self._counters_LE += load.counts_LE
            self._read_counters()
            if number % self._scenario.decide_every == 0 or not self._decided:
                self._decide("period")
            yield self._close_window()

    def _at(self, time_s: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), happens))

    # Time

    def _advance(self, to_s: float) -> None:
        seconds = to_s - self._now_s
        if seconds <= 0:
            return
        if self._conditions is None:
            self._conditions = self._look()
        now = self._conditions
        tokens_per_s = self._load.tokens_per_s if self._open else 0.0
        self._tally.tokens += tokens_per_s * seconds
        self._tally.served += self._queue.advance(seconds, tokens_per_s, now.available, now.costs)
        self._tally.availability += now.available * seconds
        if now.balancedness is not None:
            self._tally.balancedness += now.balancedness * seconds
            self._tally.judged_s += seconds
        self._now_s = to_s

    def _look(self) -> _Conditions:
        """Conditions under the current layout and load. A copying link counts as busy until the next event."""
        pairs_LE = self._load.popularity_LE * self._top_k
        hosted_LE = np.where(hosted_experts_LE(self._layout), pairs_LE, 0.0)
        met_L = np.minimum(pairs_LE.sum(axis=1) - hosted_LE.sum(axis=1), 1.0)  # lost experts that a token needs
        lost = bool((met_L > 1e-12).any())
        copying_A = self._link_busy_until_s_A > self._now_s
        link_A = self._costs.link_bytes_per_s * np.where(copying_A, 1.0 - self._scenario.move_link_part, 1.0)
        return _Conditions(
            costs=step_costs(self._layout, hosted_LE, self._fleet, link_A, self._costs),
            available=float(np.prod(1.0 - met_L)) if lost else 1.0,
            balancedness=mean_balancedness(self._layout, hosted_LE, self._living_fleet()),
        )

    def _close_window(self) -> SimulatedWindow:
        tally, self._tally = self._tally, _Tally()
        served = tally.served
        return SimulatedWindow(
            time_s=self._now_s,
            tokens_per_s=tally.tokens / served.seconds,
            served_per_s=served.tokens / served.seconds,
            step_s=served.step_seconds / served.tokens if served.tokens else None,
            wait_s=served.waited / served.tokens if served.tokens else None,
            balancedness=tally.balancedness / tally.judged_s if tally.judged_s else None,
            availability=tally.availability / served.seconds,
            replicas=self._layout.num_replicas,
            actors=int(self._alive_A.sum()),
            deaths=tally.deaths,
            moved_bytes=sum(decision.moved_bytes for decision in tally.decisions),
            decisions=tuple(tally.decisions),
        )

    # Deaths

    def _await_death(self, actor: int) -> None:
        hours = self._rng.exponential(self._scenario.actor_mtbf_hours)
        self._at(self._now_s + hours * _HOUR_S, lambda: self._die(actor))

    def _die(self, actor: int) -> None:
        if not self._alive_A[actor]:
            self._await_death(actor)  # it died earlier with its node
            return
        gone_A = np.zeros_like(self._alive_A)
        gone_A[actor] = True
        if self._rng.random() < self._scenario.whole_node_part:
            gone_A = (self._fleet.node_A == self._fleet.node_A[actor]) & self._alive_A
        self._alive_A = self._alive_A & ~gone_A
        self._tally.deaths += int(gone_A.sum())
        self._layout = surviving(self._layout, gone_A)
        self._operation = self._put_off = None
        self._link_busy_until_s_A[:] = self._now_s
        self._at(self._now_s + self._scenario.detect_s, lambda: self._decide("death"))
        self._at(self._now_s + self._scenario.restart_s, lambda: self._return(gone_A))
        self._await_death(actor)

    def _return(self, gone_A: Bools) -> None:
        self._alive_A = self._alive_A | gone_A
        self._decide("return")

    def _living_fleet(self) -> Fleet:
        return dataclasses.replace(self._fleet, slots_A=np.where(self._alive_A, self._fleet.slots_A, 0))

    # The controller

    def _read_counters(self) -> None:
        began_s = self._clock()
        layers = dict(enumerate(self._counters_LE.copy()))
        self._window.add(CounterReading(now_s=self._now_s, tokens={ROUTER: layers}))
        self._observe_s = self._clock() - began_s

    def _decide(self, cause: str) -> None:
        if self._operation is not None:
            self._put_off = cause
            return
        fleet = self._living_fleet()
        if fleet.slots_A.sum() < self._layout.num_experts_L.max():
            return  # nothing can be planned until an actor returns
        seen = Observation(
            now_s=self._now_s,
            load_LE=self._window.load_LE,
            fleet=fleet,
            layout=self._layout,
            budget_bytes=self._scenario.budget_bytes,
            burst=USUAL_BURST,
        )
        began_s = self._clock()
        if self._decided:
            decision, self._state = self._policy.decide(seen, self._state)
        else:
            plan = cold_plan(seen.load_LE, self._layout.num_experts_L, fleet)
            decision, self._decided = decision_of(seen, plan, "the first plan"), True
        decide_s = self._clock() - began_s
        assert self._alive_A[decision.layout.actor_R].all(), "a policy placed a replica on a dead actor"
        before = self._layout
        ends_s = self._apply(decision.layout)
        self._tally.decisions.append(
            SimulatedDecision(
                time_s=self._now_s,
                cause=cause,
                reason=decision.reason,
                observe_s=self._observe_s,
                decide_s=decide_s,
                apply_s=ends_s - self._now_s,
                moved_bytes=moved_bytes(before, decision.layout, fleet),
                balancedness_before=decision.balancedness_before,
                balancedness_after=decision.balancedness_after,
            )
        )

    # Changes

    def _apply(self, after: Layout) -> float:
        """Starts the change to a layout, and returns when all of it will be in place."""
        copy_bytes_per_s = self._costs.link_bytes_per_s * self._scenario.move_link_part
        transfers = schedule(self._layout, after, self._fleet, self._now_s, copy_bytes_per_s)
        ready_s_L = np.full(after.num_layers, self._now_s)
        for transfer in transfers:
            ready_s_L[transfer.layer] = max(ready_s_L[transfer.layer], transfer.end_s)
            for actor in {transfer.source, transfer.target} - {STORE}:
                self._link_busy_until_s_A[actor] = max(self._link_busy_until_s_A[actor], transfer.end_s)
        at_once_L = ready_s_L == self._now_s
        self._layout = layers_taken(self._layout, after, at_once_L)
        self._conditions = None
        if not transfers:
            self._open = True
            return self._now_s
        number = next(self._operations)
        self._operation = number
        for ready_s in np.unique(ready_s_L[~at_once_L]):
            self._at(float(ready_s), self._layers_arrive(number, after, ready_s_L == ready_s))
        end_s = float(ready_s_L.max())
        self._at(end_s, lambda: self._end_operation(number))
        return end_s

    def _layers_arrive(self, number: int, after: Layout, layers_L: Bools) -> Callable[[], None]:
        def happens() -> None:
            if self._operation == number:
                self._layout = layers_taken(self._layout, after, layers_L)

        return happens

    def _end_operation(self, number: int) -> None:
        if self._operation != number:
            return
        self._operation, self._open = None, True
        if self._put_off is not None:
            cause, self._put_off = self._put_off, None
            self._decide(cause)
