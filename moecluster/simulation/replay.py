"""Replays a recorded trace, window by window, against any policy and fleet, without a cluster.

A window is scored on the placement decided from the windows before it, as in a real cluster. The first window is not
scored: the first plan is made from it, regardless of the budget and the same under every policy.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from moecluster.errors import ConfigError
from moecluster.placement.layout import Bools, Fleet, Floats, Ints, moved_bytes
from moecluster.placement.load.window import CounterReading, LoadWindow
from moecluster.placement.names import mean_balancedness
from moecluster.placement.plan.cold import cold_plan
from moecluster.placement.policy.interface import USUAL_BURST, Observation, Policy, StateT
from moecluster.simulation.layouts import contiguous_layout, hosted_experts_LE, surviving, uniform_fleet
from moecluster.simulation.trace.format import ACTOR_DIED, TraceEvent, TraceHeader, TraceWindow

_SOURCE = "trace"


@dataclass(frozen=True, kw_only=True)
class ReplayedWindow:
    """One window under the placement decided before it, and the decision made after it."""

    time_s: float
    tokens: int  # assignments, over all layers
    balancedness: float | None  # mean over layers with tokens, of experts that are not lost. None: no such token
    lost_part: float | None  # fraction of assignments that went to experts without a replica; None: no token
    replicas: int
    moved_bytes: float  # by the decision after this window
    decide_s: float  # measured
    reason: str


@dataclass(frozen=True, kw_only=True)
class ReplaySummary:
    """A whole replay; all but cold_bytes exclude the first window and the decision after it."""

    policy: str
    windows: int
    judged: int  # windows with a token to an expert that has a replica: balancedness is over these
    mean_balancedness: float | None  # None: no such window
    worst_balancedness: float | None
    lost_part: float | None  # None: no token
    cold_bytes: float  # of the first plan
    moved_bytes: float  # of all others
    changes: int  # decisions that moved any bytes
    median_decide_s: float
    max_decide_s: float


def replay_fleet(header: TraceHeader, *, num_actors: int | None, slots: int | None) -> tuple[Fleet, tuple[str, ...]]:
    """Returns the fleet to replay on, and its actors' names: the recorded one, or one of the given size.

    slots alone changes the recorded actors' slots. num_actors makes equal actors, each on a node of its own, with the
    recorded slots in total unless slots is given. Raises ConfigError for a number below 1.
    """
    for name, value in (("--actors", num_actors), ("--slots", slots)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: got {value}, expected at least 1")
    recorded = header.fleet()
    if num_actors is None:
        names = tuple(actor.name for actor in header.actors)
        room_A = recorded.slots_A if slots is None else np.full_like(recorded.slots_A, slots)
        return dataclasses.replace(recorded, slots_A=room_A), names
    room = slots if slots is not None else -(-int(recorded.slots_A.sum()) // num_actors)
    names = tuple(f"expert-{number}" for number in range(num_actors))
    return uniform_fleet(num_actors, room, recorded.expert_bytes_L), names


class Replay(Generic[StateT]):
    """One policy on one fleet, window by window. Raises ResourceError for fewer slots than experts.

    actors: names of the fleet's actors; the trace's events of other actors are ignored. The initial layout is
    contiguous. clock: times the decisions. Raises ConfigError for a budget of 0 or less.
    """

    def __init__(
        self,
        header: TraceHeader,
        policy: Policy[StateT],
        fleet: Fleet,
        actors: Sequence[str],
        load_window: LoadWindow,
        *,
        budget_bytes: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not budget_bytes > 0:
            raise ConfigError(f"budget: got {budget_bytes:g} bytes, expected more than 0 for each decision")
        self._header = header
        self._policy = policy
        self._state = policy.first_state()
        self._whole_fleet = self._fleet = fleet
        self._actors = {name: number for number, name in enumerate(actors)}
        self._alive_A: Bools = np.ones(fleet.num_actors, dtype=np.bool_)
        self._load_window = load_window
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._layout = contiguous_layout(header.num_experts_L, fleet)
        self._counted_LE = np.zeros((self._layout.num_layers, self._layout.max_experts), dtype=np.int64)
        self._decided = False

    def step(self, window: TraceWindow) -> ReplayedWindow:
        """Scores a window on the current placement, then decides for the next one."""
        self._happen(window.events)
        hosted_LE = self._hosted(window.counts_LE)
        tokens = int(window.counts_LE.sum())
        balancedness = mean_balancedness(self._layout, hosted_LE, self._fleet)
        replicas = self._layout.num_replicas
        self._count(window)
        before = self._layout
        reason, decide_s = self._decide(window.time_s)
        return ReplayedWindow(
            time_s=window.time_s,
            tokens=tokens,
            balancedness=balancedness,
            lost_part=1.0 - float(hosted_LE.sum()) / tokens if tokens else None,
            replicas=replicas,
            moved_bytes=moved_bytes(before, self._layout, self._fleet),
            decide_s=decide_s,
            reason=reason,
        )

    def _happen(self, events: Sequence[TraceEvent]) -> None:
        """Applies events. An actor that died and returned within a window is present, but has lost its experts."""
        gone_A = np.zeros_like(self._alive_A)
        for event in events:
            if event.actor in self._actors:
                actor = self._actors[event.actor]
                self._alive_A[actor] = event.kind != ACTOR_DIED
                gone_A[actor] |= event.kind == ACTOR_DIED
        self._layout = surviving(self._layout, gone_A)
        slots_A = np.where(self._alive_A, self._whole_fleet.slots_A, 0)
        self._fleet = dataclasses.replace(self._whole_fleet, slots_A=slots_A)

    def _hosted(self, counts_LE: Ints) -> Floats:
        """Returns the counts of the experts that have a replica."""
        return np.where(hosted_experts_LE(self._layout), counts_LE, 0).astype(np.float64)

    def _count(self, window: TraceWindow) -> None:
        if not self._decided:
            self._load_window.add(self._reading(window.time_s - self._header.window_s))
        self._counted_LE = self._counted_LE + window.counts_LE
        self._load_window.add(self._reading(window.time_s))

    def _reading(self, now_s: float) -> CounterReading:
        rows = zip(self._header.layers, self._counted_LE, strict=True)
        return CounterReading(now_s=now_s, tokens={_SOURCE: {x.layer: counted_E[: x.experts] for x, counted_E in rows}})

    def _decide(self, now_s: float) -> tuple[str, float]:
        """Decides the next placement; returns the reason, and the seconds that the policy took."""
        if self._fleet.slots_A.sum() < self._layout.num_experts_L.max():
            return "fewer slots than experts until an actor returns", 0.0
        seen = Observation(
            now_s=now_s,
            load_LE=self._load_window.load_LE,
            fleet=self._fleet,
            layout=self._layout,
            budget_bytes=self._budget_bytes,
            burst=USUAL_BURST,
        )
        began_s = self._clock()
        if self._decided:
            decision, self._state = self._policy.decide(seen, self._state)
            self._layout, reason = decision.layout, decision.reason
        else:
            self._layout = cold_plan(seen.load_LE, self._layout.num_experts_L, self._fleet)
            self._decided, reason = True, "the first plan"
        return reason, self._clock() - began_s


def summarize(policy: str, windows: Sequence[ReplayedWindow]) -> ReplaySummary:
    """Returns the summary. Raises ConfigError if there is only one window."""
    scored = windows[1:]
    if not scored:
        raise ConfigError("the trace has one window, expected at least 2: one to decide on and one to score")
    judged = [window.balancedness for window in scored if window.balancedness is not None]
    tokens = sum(window.tokens for window in scored)
    lost = sum(window.lost_part * window.tokens for window in scored if window.lost_part is not None)
    return ReplaySummary(
        policy=policy,
        windows=len(scored),
        judged=len(judged),
        mean_balancedness=statistics.fmean(judged) if judged else None,
        worst_balancedness=min(judged, default=None),
        lost_part=lost / tokens if tokens else None,
        cold_bytes=windows[0].moved_bytes,
        moved_bytes=sum(window.moved_bytes for window in scored),
        changes=sum(window.moved_bytes > 0 for window in scored),
        median_decide_s=statistics.median(window.decide_s for window in scored),
        max_decide_s=max(window.decide_s for window in scored),
    )
