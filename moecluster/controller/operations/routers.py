"""Scales the routers, by request or with the load.

The state of a leaving router shows that it leaves, so that gateways send it no new requests. It accepts those that
arrive all the same, and is ended when it has none left, or after a timeout: its requests then continue at another
router, as when a router is lost. A successor finds the routers in the supervisor's list, and finds which ones leave,
since those of the highest numbers do. The first router, where training runs, stays.

Routers on nodes that Ray is about to remove leave, whatever their numbers, as soon as others serve in their place: for
that one router more than wanted is started. One that trains stays as long as its node.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from moecluster.controller.context import ControllerContext
from moecluster.controller.operations.periodic_thread import FAILED_INSIDE, PeriodicThread
from moecluster.errors import MoeClusterError, ResourceError
from moecluster.placement.departures import number_of
from moecluster.placement.scaling import RouterObservation, RouterSizeSettings, SizeState, decide_routers
from moecluster.types import Operation, OperationKind, OperationPhase, RouterState

logger = logging.getLogger(__name__)

ORDERED = "requested"  # reason of a user's request, which no automatic decision replaces
EVADED = "Ray is about to remove the node of "  # begins the reason of an operation that only replaces routers
STEP_S = 0.2  # between checks while routers start or leave


class RouterSupervisor(Protocol):
    """Starts routers, and restarts them when they die.

    What it says of the cluster is complete and of now, or it raises Unavailable: no answer is not an empty one.
    """

    def existing_routers(self) -> tuple[str, ...]:
        """The routers that exist or are being started. Raises Unavailable."""

    def create_router(self, router: str, checkpoint: str) -> None:
        """Requests a router that serves the trunk of a checkpoint. Does nothing if it exists. Raises Unavailable."""

    def remove_router(self, router: str) -> None:
        """Ends a router for good. Does nothing if it is gone. Never raises: the request may be lost."""

    def draining_nodes(self) -> Mapping[str, float]:
        """Nodes that are about to be removed, and in how many seconds (inf: unknown). Raises Unavailable."""

    def routers_on(self, nodes: Collection[str]) -> frozenset[str]:
        """The routers whose processes run on these nodes. Raises Unavailable."""


@dataclass(frozen=True, kw_only=True)
class RouterSizingSettings:
    """How many routers there may be, and how they start and leave."""

    min_routers: int = 1  # lower limit of scale requests
    max_routers: int = 0  # upper limit of scale requests; 0: no limit
    size: RouterSizeSettings | None = None  # None: only scale requests change the number
    period_s: float = 2.0
    lease_s: float = 10.0  # a silent router may still exist for so long
    start_timeout_s: float = 600.0
    drain_timeout_s: float = 300.0
    idle_s: float = 3.0  # without requests until a leaving router is ended: by then gateways have seen that it leaves


@dataclass(kw_only=True)
class _Change:
    """The current operation."""

    operation: Operation
    since_s: float
    asked: set[str] = field(default_factory=set)  # routers that were started for it

    @property
    def wanted(self) -> int:
        return int(self.operation.arguments[0])


@dataclass(kw_only=True)
class _Leaving:
    """A leaving router."""

    since_s: float
    idle_since_s: float | None = None


class RouterSizing:
    """Its thread runs from start to close. Any thread may call request and states."""

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
        self._leaving: dict[str, _Leaving] = {}  # replaced, never mutated, as other threads read it
        self._evading: frozenset[str] = frozenset()  # routers on nodes that are about to be removed
        self._evaded_in_vain: frozenset[str] = frozenset()  # those that could not be replaced
        self._thread = PeriodicThread(
            "router-sizing",
            self._run_once,
            period_s=lambda: settings.period_s if self._change is None else min(STEP_S, settings.period_s),
            without_result="the routers stay as they are",
            on_bug=lambda: self._fail(FAILED_INSIDE),
        )

    def start(self) -> None:
        self._started_s = self._clock()
        self._thread.start()

    def close(self) -> None:
        """Stops the thread. A successor finds the current operation unfinished."""
        self._thread.close()

    def request(self, routers: int, *, operation_id: str = "") -> Operation:
        """Requests a number of routers. Raises ResourceError beyond the limits."""
        lowest, highest = self._settings.min_routers, self._settings.max_routers
        if routers < lowest or (highest and routers > highest):
            limit = f"{lowest} to {highest}" if highest else f"{lowest} or more"
            raise ResourceError(
                f"scale: {routers} routers are beyond the limits, which are {limit} "
                "(serve.min_routers, serve.max_routers)"
            )
        operation = self._log.enqueue(
            OperationKind.SCALE_ROUTERS, reason=ORDERED, arguments=(str(routers),), operation_id=operation_id
        )
        self._thread.wake()
        return operation

    def states(self) -> tuple[RouterState, ...]:
        """Returns the reported state of every router with a lease, and whether it leaves."""
        leaving = self._leaving
        return tuple(replace(s, leaving=name in leaving) for name, s in self._leases.states().items())

    # -- the thread --

    def _run_once(self) -> None:
        """One round: the newest operation replaces the current one, which then goes a step further."""
        known = sorted(self._supervisor.existing_routers(), key=number_of)  # without an answer the round ends here
        if not known and self._leases.current():
            return  # they report, so they are there
        self._leaving = {name: since for name, since in self._leaving.items() if name in known}
        self._evading = self._on_removed_nodes() & {*known}
        staying = [name for name in known if name not in self._leaving]
        self._decide(staying)
        self._evade(staying)
        for operation in self._log.queued({OperationKind.SCALE_ROUTERS}):
            self._end(OperationPhase.FAILED, f"superseded by {operation.id}")
            self._change = _Change(operation=operation, since_s=self._clock())
            self._report(OperationPhase.PREPARING, "")
        if self._change is not None:
            self._go_on(self._change, known)

    def _decide(self, staying: list[str]) -> None:
        """Queues another number of routers if the load asks for it."""
        size, now_s = self._settings.size, self._clock()
        if size is None or not staying or now_s - self._started_s < self._settings.lease_s:
            return  # routers must report first
        under_way = [self._change.operation] if self._change is not None else []
        if any(
            operation.reason == ORDERED for operation in (*under_way, *self._log.queued({OperationKind.SCALE_ROUTERS}))
        ):
            return  # a user's request comes first
        states = self._leases.states()
        heard = [states[name] for name in staying if name in states]
        if not heard:
            return  # silence is no report of idle routers
        # While routers are replaced, one is there twice.
        routers = min(len(staying), self._change.wanted) if self._change and self._evading else len(staying)
        seen = RouterObservation(
            now_s=now_s,
            routers=routers,
            running=sum(state.running for state in heard),
            waiting=sum(state.waiting for state in heard),
            silent=len(staying) - len(heard),
        )
        wanted, why, self._size_state = decide_routers(seen, self._size_state, size)
        if wanted != seen.routers:
            self._log.enqueue(OperationKind.SCALE_ROUTERS, reason=why, arguments=(str(wanted),))

    def _go_on(self, change: _Change, known: list[str]) -> None:
        """Goes a step further. Each step may be repeated: what is done already is left alone."""
        coming: list[str] = []
        try:
            coming = [name for name in self._aim(change, known) if not self._serves(name)]
            waits = [f"{name} does not serve yet" for name in coming] + self._not_replaced() + self._let_leave()
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
        """Takes back leaving routers, requests new ones, or lets some leave, as needed; returns those that stay."""
        here = [name for name in known if name not in self._leaving]
        staying = [name for name in here if name not in self._evading]
        evading = [name for name in here if name in self._evading]
        missing = max(change.wanted - len(staying), 0)
        back = [name for name in sorted(self._leaving, key=number_of) if name not in self._evading][:missing]
        self._leaving = {name: since for name, since in self._leaving.items() if name not in back}
        most = change.wanted + (1 if evading else 0)
        new = _new_names(known, max(min(missing - len(back), most - len(here) - len(back)), 0))
        for name in new:
            change.asked.add(name)
            self._supervisor.create_router(name, self._cluster_state.versions.checkpoint)
        wanted = max(change.wanted, 1)
        leaving = [*staying[wanted:], *self._replaced(evading, staying, wanted)]
        self._leaving = {**self._leaving, **{name: _Leaving(since_s=self._clock()) for name in leaving}}
        return [*staying[:wanted], *back, *new]

    def _replaced(self, evading: list[str], staying: list[str], wanted: int) -> list[str]:
        """Returns the routers on nodes that are about to be removed that others can do without; the first ones last."""
        serving = sum(self._serves(name) for name in staying)
        if not serving:
            return []
        holding = self._leases.holding()
        return [name for name in evading[max(wanted - serving, 0) :] if name not in holding]

    def _on_removed_nodes(self) -> frozenset[str]:
        """Returns the routers on nodes that are about to be removed. Without an answer, those known so far."""
        try:
            nodes = self._supervisor.draining_nodes()
            return self._supervisor.routers_on(nodes) if nodes else frozenset()
        except MoeClusterError as exc:
            logger.info("which routers are on nodes that are about to be removed is not known: %s", exc)
            return self._evading

    def _evade(self, staying: Collection[str]) -> None:
        """Queues an operation that replaces the routers on nodes that are about to be removed, if none is under way."""
        evading = self._evading.intersection(staying)
        self._evaded_in_vain &= evading
        if not evading or evading == self._evaded_in_vain or self._change is not None:
            return
        if not self._log.queued({OperationKind.SCALE_ROUTERS}):
            reason = EVADED + ", ".join(sorted(evading, key=number_of))
            self._log.enqueue(OperationKind.SCALE_ROUTERS, reason=reason, arguments=(str(len(staying)),))

    def _not_replaced(self) -> list[str]:
        """Returns why routers on nodes that are about to be removed still stay."""
        left = sorted(self._evading - self._leaving.keys(), key=number_of)
        return [f"{name} stays until another one serves in its place, or while it trains" for name in left]

    def _let_leave(self) -> list[str]:
        """Ends the leaving routers that are idle or past drain_timeout_s; returns why each is still waited for."""
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
                self._supervisor.remove_router(name)  # again at the next check, until it no longer exists
                self._leases.drop(name)
        return [_still_has(name, states.get(name)) for name in self._leaving]

    def _is_idle(self, state: RouterState | None, leaving: _Leaving) -> bool:
        if state is None:  # its process is gone, or it has not found this controller yet
            return self._clock() - leaving.since_s >= self._settings.lease_s
        return not (state.running or state.waiting or state.router in self._leases.holding())

    def _serves(self, router: str) -> bool:
        state = self._leases.states().get(router)
        return state is not None and bool(state.address)

    def _give_up(self, change: _Change, coming: Iterable[str], why: str) -> None:
        """Removes the routers that were requested and never came up, and fails the operation."""
        for name in change.asked.intersection(coming):
            self._supervisor.remove_router(name)
        self._evaded_in_vain = self._evading - self._leaving.keys()
        self._fail(f"{why}, after {self._settings.start_timeout_s:g} s; is the Ray cluster short of CPUs or memory?")

    def _fail(self, detail: str) -> None:
        """Fails the operation; its leaving routers stay."""
        self._leaving = {}
        self._end(OperationPhase.FAILED, detail)

    # -- reports --

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
    """Returns names with the lowest free numbers; the first router's name has none."""
    taken = set(known)
    names = ("router", *(f"router-{n}" for n in range(1, len(taken) + count)))
    return [name for name in names if name not in taken][:count]


def _still_has(router: str, state: RouterState | None) -> str:
    """Returns why a leaving router is waited for."""
    if state is None:
        return f"{router} does not report"
    texts = state.running + state.waiting
    return (
        f"{router} leaves"
        if not texts
        else f"{router} leaves with {texts} {'request' if texts == 1 else 'requests'} to finish"
    )
