"""Which routers there are: more are started under a queue or by order, those that are too many leave and are ended.

A router that leaves is shown as such with its state, so that gateways send it no new texts. It takes those that come
all the same, and is ended when it has none any more, or after a timeout: then its texts go on at another router, as
they do when a router is lost. The supervisor's list says which routers are there, so a successor finds them; the
routers of the highest numbers leave, so it also finds which. The first router, where training runs, stays.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from moecluster.controller.context import ControllerContext
from moecluster.controller.operations.expert_actors import number_of
from moecluster.controller.operations.periodic_thread import FAILED_INSIDE, PeriodicThread
from moecluster.errors import MoeClusterError, ResourceError
from moecluster.placement.scaling import RouterObservation, RouterSizeSettings, SizeState, decide_routers
from moecluster.types import Operation, OperationKind, OperationPhase, RouterState

logger = logging.getLogger(__name__)

ORDERED = "ordered"  # the reason of what a user asks for: no decision takes its place
STEP_S = 0.2  # between looks while routers come or leave


class RouterSupervisor(Protocol):
    """What starts routers, and starts them again when they die."""

    def existing_routers(self) -> tuple[str, ...]:
        """The routers that are there, or are being started."""

    def create_router(self, router: str, checkpoint: str) -> None:
        """Asks for a router that serves the trunk of a checkpoint. Fine if it is there already."""

    def remove_router(self, router: str) -> None:
        """Ends a router for good. Fine if it is gone already."""


@dataclass(frozen=True, kw_only=True)
class RouterSizingSettings:
    """How many routers there may be, and how they come and leave."""

    min_routers: int = 1  # by order
    max_routers: int = 0  # by order; 0: no limit
    size: RouterSizeSettings | None = None  # None: the number is changed by orders alone
    period_s: float = 2.0
    lease_s: float = 10.0  # so long a router that is not heard of may still be there
    start_timeout_s: float = 600.0
    drain_timeout_s: float = 300.0
    idle_s: float = (
        3.0  # without a text before a router that leaves is ended: gateways have seen by then that it leaves
    )


@dataclass(kw_only=True)
class _Change:
    """The operation that is under way."""

    operation: Operation
    since_s: float
    asked: set[str] = field(default_factory=set)  # routers that were started for it

    @property
    def wanted(self) -> int:
        return int(self.operation.arguments[0])


@dataclass(kw_only=True)
class _Leaving:
    """A router that leaves."""

    since_s: float
    idle_since_s: float | None = None


class RouterSizing:
    """Begins with start, ends with close. Orders, and what is shown, from any thread."""

    def __init__(
        self, context: ControllerContext, settings: RouterSizingSettings, *, supervisor: RouterSupervisor
    ) -> None:
        self._settings = settings
        self._cluster_state = context.state
        self._leases = context.leases
        self._log = context.operations
        self._clock = context.clock
        self._supervisor = supervisor
        self._started_s = self._clock()
        self._size_state = SizeState()
        self._change: _Change | None = None
        self._leaving: dict[str, _Leaving] = {}  # replaced, never changed, as other threads read it
        self._rounds = PeriodicThread(
            "router-sizing",
            self._run_once,
            period_s=lambda: settings.period_s if self._change is None else min(STEP_S, settings.period_s),
            without_result="the routers stay as they are",
            on_bug=lambda: self._fail(FAILED_INSIDE),
        )

    def start(self) -> None:
        self._started_s = self._clock()
        self._rounds.start()

    def close(self) -> None:
        """What is under way ends as an operation that a successor finds unfinished."""
        self._rounds.close()

    def order(self, routers: int, *, operation_id: str = "") -> Operation:
        """Begins to make it so many routers. Raises ResourceError beyond the limits."""
        lowest, highest = self._settings.min_routers, self._settings.max_routers
        if routers < lowest or (highest and routers > highest):
            limit = f"{lowest} to {highest}" if highest else f"{lowest} or more"
            raise ResourceError(
                f"scale: {routers} routers are beyond the limits, which are {limit} "
                "(serve.min_routers, serve.max_routers)"
            )
        operation = self._log.order(
            OperationKind.SCALE_ROUTERS, reason=ORDERED, arguments=(str(routers),), operation_id=operation_id
        )
        self._rounds.wake()
        return operation

    def states(self) -> tuple[RouterState, ...]:
        """What the routers that hold a lease say of themselves, and which of them leave."""
        leaving = self._leaving
        return tuple(replace(s, leaving=name in leaving) for name, s in self._leases.states().items())

    # -- the thread --

    def _run_once(self) -> None:
        """One round: what is ordered or decided anew takes the place of what is under way; that goes a step further."""
        known = sorted(self._supervisor.existing_routers(), key=number_of)
        self._leaving = {name: since for name, since in self._leaving.items() if name in known}
        self._decide([name for name in known if name not in self._leaving])
        for operation in self._log.queued({OperationKind.SCALE_ROUTERS}):
            self._end(OperationPhase.FAILED, f"{operation.id} has taken its place")
            self._change = _Change(operation=operation, since_s=self._clock())
            self._report(OperationPhase.PREPARING, "")
        if self._change is not None:
            self._go_on(self._change, known)

    def _decide(self, staying: list[str]) -> None:
        """Orders another number of routers if the texts ask for it."""
        size, now_s = self._settings.size, self._clock()
        if size is None or not staying or now_s - self._started_s < self._settings.lease_s:
            return  # routers must be heard first
        under_way = [self._change.operation] if self._change is not None else []
        if any(
            operation.reason == ORDERED for operation in (*under_way, *self._log.queued({OperationKind.SCALE_ROUTERS}))
        ):
            return  # what a user asks for comes first
        states = self._leases.states()
        heard = [states[name] for name in staying if name in states]
        seen = RouterObservation(
            now_s=now_s,
            routers=len(staying),
            running=sum(state.running for state in heard),
            waiting=sum(state.waiting for state in heard),
        )
        wanted, why, self._size_state = decide_routers(seen, self._size_state, size)
        if wanted != seen.routers:
            self._log.order(OperationKind.SCALE_ROUTERS, reason=why, arguments=(str(wanted),))

    def _go_on(self, change: _Change, known: list[str]) -> None:
        """A step. Each may be repeated: what is done already is left alone."""
        coming: list[str] = []
        try:
            coming = [name for name in self._aim(change, known) if not self._serves(name)]
            waits = [f"{name} does not serve yet" for name in coming] + self._let_leave()
        except MoeClusterError as exc:
            waits = [str(exc)]
        if (coming or not self._leaving) and waits and self._clock() - change.since_s > self._settings.start_timeout_s:
            self._give_up(change, coming, "; ".join(waits))
        elif waits:
            phase = OperationPhase.COMMITTING if self._leaving else OperationPhase.PREPARING
            self._report(phase, f"waits: {'; '.join(waits)}")
        else:
            self._end(OperationPhase.DONE, "")

    def _aim(self, change: _Change, known: list[str]) -> list[str]:
        """Takes back, asks for, or lets leave as many as it takes; returns those that stay."""
        staying = [name for name in known if name not in self._leaving]
        missing = change.wanted - len(staying)
        if missing > 0:
            back = sorted(self._leaving, key=number_of)[:missing]
            self._leaving = {name: since for name, since in self._leaving.items() if name not in back}
            new = _new_names(known, missing - len(back))
            for name in new:
                change.asked.add(name)
                self._supervisor.create_router(name, self._cluster_state.versions.checkpoint)
            return [*staying, *back, *new]
        leaving = staying[max(change.wanted, 1) :]
        self._leaving = {**self._leaving, **{name: _Leaving(since_s=self._clock()) for name in leaving}}
        return staying[: max(change.wanted, 1)]

    def _let_leave(self) -> list[str]:
        """Ends the routers that have no text any more, or had time enough; returns what is waited for."""
        now_s, states = self._clock(), self._leases.states()
        for name, leaving in self._leaving.items():
            state = states.get(name)
            if not self._is_idle(state, leaving):
                leaving.idle_since_s = None
            elif leaving.idle_since_s is None:
                leaving.idle_since_s = now_s
            idle = leaving.idle_since_s is not None and now_s - leaving.idle_since_s >= self._settings.idle_s
            if idle or now_s - leaving.since_s >= self._settings.drain_timeout_s:
                logger.info("%s is ended: %s", name, _still_has(name, state))
                self._supervisor.remove_router(name)  # again at the next look, until it is not known any more
                self._leases.drop(name)
        return [_still_has(name, states.get(name)) for name in self._leaving]

    def _is_idle(self, state: RouterState | None, leaving: _Leaving) -> bool:
        if state is None:  # its process is gone, or it has not found this controller yet
            return self._clock() - leaving.since_s >= self._settings.lease_s
        return not (state.running or state.waiting)

    def _serves(self, router: str) -> bool:
        state = self._leases.states().get(router)
        return state is not None and bool(state.address)

    def _give_up(self, change: _Change, coming: Iterable[str], why: str) -> None:
        """Routers that were asked for and never came are not waited for any more."""
        for name in change.asked.intersection(coming):
            self._supervisor.remove_router(name)
        self._fail(f"{why}, after {self._settings.start_timeout_s:g} s; is the Ray cluster short of CPUs or memory?")

    def _fail(self, detail: str) -> None:
        """The routers that were to leave by the operation stay."""
        self._leaving = {}
        self._end(OperationPhase.FAILED, detail)

    # -- what is shown --

    def _report(self, phase: OperationPhase, detail: str) -> None:
        assert self._change is not None
        before = self._log.get(self._change.operation.id)
        if (before.phase, before.detail) != (phase, detail):
            self._log.update(before.id, phase=phase, detail=detail)

    def _end(self, phase: OperationPhase, detail: str) -> None:
        if self._change is not None:
            self._log.update(self._change.operation.id, phase=phase, detail=detail)
            self._change = None


def _new_names(known: Iterable[str], count: int) -> list[str]:
    """Names of the lowest numbers that no router has; the first one has none."""
    taken = set(known)
    names = ("router", *(f"router-{n}" for n in range(1, len(taken) + count)))
    return [name for name in names if name not in taken][:count]


def _still_has(router: str, state: RouterState | None) -> str:
    """What a router that leaves is waited for."""
    if state is None:
        return f"{router} is not heard of"
    texts = state.running + state.waiting
    return (
        f"{router} leaves" if not texts else f"{router} leaves with {texts} {'text' if texts == 1 else 'texts'} to end"
    )
