"""Load sources: the cumulative counters of routers and expert actors.

A source returns counters only; windows (placement/load/window.py) and speeds (speed.py) are computed from them. The
source here takes them from reports; prometheus.py takes them from a Prometheus server. Both lead to the same decisions.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moecluster.errors import InvalidMessage
from moecluster.placement.load.window import CounterReading
from moecluster.types import ActorWork, ExpertId, LoadSnapshot

MAX_ROUTERS = 256
FORGET_AFTER_S = 600.0
MAX_ASSIGNMENTS = 2**40  # of an expert in one report; sums of such reports stay far within int64


@dataclass(frozen=True, kw_only=True)
class SourceReading:
    """All counters at one moment."""

    counters: CounterReading
    # Actor -> its computed_rows, expert_runs and busy_s; actors that have not computed yet may be missing.
    work: Mapping[str, ActorWork]


class LoadSource(Protocol):
    """Returns counters. Reading loses nothing: counters only grow."""

    def read(self, now_s: float) -> SourceReading:
        """Returns the newest counters and their time by the caller's clock, which reads now_s: they may be older.

        Returns the same object again if there is nothing new. Raises a MoeClusterError with a one-line message if there
        are no reliable counters; the next reading then includes what this one missed.
        """


@dataclass(kw_only=True)
class _Counted:
    tokens: dict[int, npt.NDArray[np.int64]]  # layer -> assignments per expert [E]
    heard_s: float


@dataclass(frozen=True, kw_only=True)
class _Worked:
    work: ActorWork
    heard_s: float


class DirectLoadSource:
    """A LoadSource fed by the routers' reports and the actors' answers. Thread-safe.

    Routers and actors silent for forget_after_s are forgotten; so is, beyond max_routers, the router silent for
    longest. A router that comes back counts from 0, like a restarted one.
    """

    def __init__(
        self,
        layer_experts: Mapping[int, int],
        *,
        forget_after_s: float = FORGET_AFTER_S,
        max_routers: int = MAX_ROUTERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """layer_experts: MoE layer -> its number of experts. clock: seconds, to measure silence only."""
        self._layer_experts = dict(layer_experts)
        self._forget_after_s = forget_after_s
        self._max_routers = max_routers
        self._clock = clock
        self._routers: dict[str, _Counted] = {}
        self._work: dict[str, _Worked] = {}
        self._lock = threading.Lock()

    def add(self, router: str, load: LoadSnapshot) -> None:
        """Adds what a router counted in its last window.

        Raises InvalidMessage, before anything is changed, if it names an expert that the model does not have.
        """
        for expert, assignments in load.tokens.items():
            self._check(router, expert, assignments)
        with self._lock:
            counted = self._routers.get(router)
            if counted is None:
                self._make_room()
                counted = self._routers[router] = _Counted(tokens={}, heard_s=0.0)
            counted.heard_s = self._clock()
            for expert, assignments in load.tokens.items():
                if expert.layer not in counted.tokens:
                    counted.tokens[expert.layer] = np.zeros(self._layer_experts[expert.layer], dtype=np.int64)
                counted.tokens[expert.layer][expert.index] += assignments

    def set_work(self, actor: str, work: ActorWork) -> None:
        """Stores the work that an actor reports of its current incarnation."""
        with self._lock:
            self._work[actor] = _Worked(work=work, heard_s=self._clock())

    def read(self, now_s: float) -> SourceReading:
        """Returns what was reported until now; never raises."""
        with self._lock:
            oldest_s = self._clock() - self._forget_after_s
            self._routers = {router: c for router, c in self._routers.items() if c.heard_s >= oldest_s}
            self._work = {actor: w for actor, w in self._work.items() if w.heard_s >= oldest_s}
            tokens = {
                router: {layer: tokens_E.copy() for layer, tokens_E in counted.tokens.items()}
                for router, counted in self._routers.items()
            }
            work = {actor: worked.work for actor, worked in self._work.items()}
        return SourceReading(counters=CounterReading(now_s=now_s, tokens=tokens), work=work)

    def _check(self, router: str, expert: ExpertId, assignments: int) -> None:
        if not 0 <= expert.index < self._layer_experts.get(expert.layer, 0):
            raise InvalidMessage("loads.expert", f"{router} counts {expert}, which the model does not have")
        if not 0 <= assignments <= MAX_ASSIGNMENTS:
            raise InvalidMessage(
                "loads.assignments", f"{router} counts {assignments} of {expert}, expected 0 to {MAX_ASSIGNMENTS}"
            )

    def _make_room(self) -> None:
        if len(self._routers) >= self._max_routers:
            del self._routers[min(self._routers, key=lambda router: self._routers[router].heard_s)]
