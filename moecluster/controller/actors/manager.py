"""Owns the actor monitors of a controller: gives them the desired state, and handles their events."""

import logging
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moecluster.controller.actors.interfaces import ActorSupervisor, DesiredState, Watch
from moecluster.controller.actors.monitor import ActorMonitor
from moecluster.controller.actors.replicas_aside import ReplicasAside
from moecluster.controller.context import ControllerContext
from moecluster.controller.load.direct import DirectLoadSource
from moecluster.controller.state.handover import READ_TIMEOUT_S, KeptSnapshot, read_actors
from moecluster.errors import MoeClusterError, StaleRequest, Unavailable, UserError
from moecluster.rpc.expert.interface import Connect
from moecluster.types import (
    ActorAddress,
    ActorState,
    ExpertActorStatus,
    ExpertId,
    OperationKind,
    OperationPhase,
    PlacementNumber,
    ReplicaAside,
    WeightVersion,
)

logger = logging.getLogger(__name__)

ASK_AGAIN_S = 0.2


@dataclass(frozen=True, kw_only=True)
class ActorManagerSettings:
    """How actors are started, checked and loaded."""

    dtype: str = ""  # of experts; empty: the checkpoint's
    health_period_s: float = 1.0
    start_timeout_s: float = 60.0  # for an actor to restart
    load_timeout_s: float = 60.0


class ActorManager:
    """Implements MonitorOwner of interfaces.py. Thread-safe."""

    def __init__(
        self,
        context: ControllerContext,
        settings: ActorManagerSettings,
        *,
        direct: DirectLoadSource,
        supervisor: ActorSupervisor,
        connect: Connect,
        watch: Watch,
        snapshot: KeptSnapshot,
    ) -> None:
        """direct: receives the work of actors. snapshot: the controller's snapshot, which actors keep."""
        self._settings = settings
        self._cluster_state = context.state
        self._leases = context.leases
        self._log = context.operations
        self._reports = context.reports
        self._signals = context.signals
        self._clock = context.clock
        self._direct = direct
        self._supervisor = supervisor
        self._connect = connect
        self._watch = watch
        self._snapshot = snapshot
        self._aside = ReplicasAside(context, check=self.check)
        self._lock = threading.RLock()
        self._monitors: dict[str, ActorMonitor] = {}
        self._closed = False
        self._first_outcomes: dict[str, MoeClusterError | None] = {}  # by actor; None: it came up
        self._awaited: frozenset[str] = frozenset()  # actors that the first placement waits for
        self._all_tried = threading.Event()
        self._restores: dict[str, str] = {}  # lost actor -> operation id
        self._signals.changed.listen(self._look_all)

    def existing(self, timeout_s: float) -> tuple[str, ...]:
        """Returns the expert actors that exist or are being started, once the supervisor answers. Raises Unavailable
        after the timeout."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return self._supervisor.known()
            except Unavailable:
                if time.monotonic() >= deadline_s:
                    raise
                time.sleep(ASK_AGAIN_S)

    def read(self, actors: Sequence[str]) -> list[ExpertActorStatus]:
        """Returns the status of every actor that answers, sorted by placement number. Call before any request."""
        return read_actors(lambda actor: self._new_monitor(actor).read(READ_TIMEOUT_S), actors)

    def start(self, actors: Collection[str], *, awaited: Collection[str]) -> None:
        """Starts monitoring the initial actors; awaited: those that the first placement waits for."""
        self._awaited = frozenset(awaited)
        for actor in actors:
            self.keep(actor)

    def wait_tried(self, timeout_s: float) -> list[MoeClusterError]:
        """Waits until the awaited actors came up or failed; returns why actors failed, user errors first."""
        self._all_tried.wait(timeout_s)
        with self._lock:
            failures = [error for error in self._first_outcomes.values() if error is not None]
        return sorted(failures, key=lambda error: not isinstance(error, UserError))

    def keep(self, actor: str) -> None:
        """Starts monitoring an actor. Does nothing if it is monitored already."""
        with self._lock:
            if actor in self._monitors or self._closed:
                return
            monitor = self._monitors[actor] = self._new_monitor(actor)
        monitor.start()

    def let_go(self, actor: str) -> None:
        """Stops monitoring an actor that leaves the cluster."""
        with self._lock:
            monitor = self._monitors.pop(actor, None)
        if monitor is not None:
            monitor.let_go()  # not close: the reconciler must not wait for a lost actor
        self._reports.forget(actor)
        self._end_restore(actor, OperationPhase.FAILED, detail=f"{actor} was removed from the cluster")

    def check(self, actor: str) -> None:
        """Checks the actor's health now: it may be lost."""
        monitor = self._monitors.get(actor)
        if monitor is not None:
            monitor.check()

    def states(self) -> tuple[ActorState, ...]:
        """Returns the last known state of every actor."""
        with self._lock:
            return tuple(monitor.state() for _, monitor in sorted(self._monitors.items()))

    def close(self) -> None:
        """Stops all monitors, and leaves the actors as they are."""
        with self._lock:
            self._closed = True
            monitors = list(self._monitors.values())
        for monitor in monitors:
            monitor.close()

    # -- for actor monitors --

    def desired_state(self) -> DesiredState:
        """Returns the state to send to actors."""
        with self._cluster_state.unchanged():
            number, versions = self._cluster_state.number, self._cluster_state.versions
        return DesiredState(
            term=number.term,
            generation=number.generation,
            versions=versions,
            dtype=self._settings.dtype,
            snapshot=self._snapshot.encoded(),
        )

    def assigned(self, actor: str) -> frozenset[ExpertId]:
        """The experts that the actor should hold."""
        return self._cluster_state.assigned(actor)

    def kept(self, actor: str) -> frozenset[ExpertId]:
        """The experts that the actor may hold."""
        return self._cluster_state.kept(actor)

    def lost(self) -> frozenset[ExpertId]:
        """Experts that no actor serves."""
        return self._cluster_state.lost()

    def settled(self) -> bool:
        """Whether every router with a lease had the time to apply a placement of this controller."""
        return self._leases.settled()

    def actor_up(
        self,
        address: ActorAddress,
        held: Collection[ExpertId],
        *,
        versions: tuple[WeightVersion, ...],
        complete: bool,
    ) -> None:
        """The actor serves these experts: routers may use it."""
        if complete:
            self._end_restore(address.actor, OperationPhase.DONE)
            self._note_outcome(address.actor, None)
        self._cluster_state.actor_up(address, held, versions=versions)
        self._signals.wake.emit()

    def actor_prepared(
        self, address: ActorAddress, version: int, experts: Collection[ExpertId], *, loaded_bytes: int
    ) -> None:
        """The actor holds these experts in the next version."""
        self._reports.prepared(address.actor)
        if loaded_bytes:
            operation = next((o for o in self._log.under_way() if o.kind is OperationKind.UPDATE), None)
            if operation is not None:
                self._log.count_moved(operation.id, loaded_bytes=loaded_bytes, added=0, removed=0)
        if self._cluster_state.actor_prepared(address, version, experts):
            self._signals.wake.emit()

    def preparing_failed(self, actor: str, version: int, error: MoeClusterError) -> None:
        """The actor cannot load the next version now."""
        self._reports.preparing_failed(actor, version, error)
        self._signals.wake.emit()

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        """A router received NaN or infinity from a replica."""
        self._aside.report(actor, incarnation, expert, placement)

    def replicas_aside(self) -> tuple[ReplicaAside, ...]:
        """Replicas that returned NaN or infinity to routers."""
        return self._aside.states()

    def to_reload(self, actor: str) -> frozenset[ExpertId]:
        """The experts to reload."""
        return self._aside.to_reload(actor)

    def reloaded(self, actor: str, experts: Collection[ExpertId], loaded_bytes: int) -> None:
        """The actor has reloaded these experts."""
        self._aside.reloaded(actor, experts, loaded_bytes)

    def reload_failed(self, actor: str, experts: Collection[ExpertId], error: MoeClusterError) -> None:
        """The actor cannot reload these experts."""
        self._aside.reload_failed(actor, experts, str(error))

    def actor_loaded(self, actor: str, loaded_bytes: int) -> None:
        """The actor has loaded experts after its start."""
        operation_id = self._restores.get(actor)
        if operation_id is not None:
            self._log.count_moved(operation_id, loaded_bytes=loaded_bytes, added=0, removed=0)

    def actor_reports(self, address: ActorAddress, status: ExpertActorStatus) -> None:
        """The actor answered a health check."""
        self._reports.add(status, self._clock())
        self._direct.set_work(address.actor, status.work)

    def actor_down(self, actor: str) -> None:
        """The actor is lost: its experts' requests go to other replicas, or wait."""
        self._cluster_state.actor_down(actor)
        self._reports.forget(actor)
        # Before taking the lock: a change of the state calls _look_all, which takes it, with the state's lock held.
        belongs, experts = actor in self._cluster_state.actors, len(self._cluster_state.assigned(actor))
        with self._lock:
            if actor not in self._restores and belongs:
                reason = f"{actor} was lost with {experts} replicas"
                self._restores[actor] = self._log.begin(OperationKind.RESTORE, reason=reason, arguments=(actor,)).id
        self._signals.wake.emit()

    def actor_failed(self, actor: str, error: MoeClusterError) -> None:
        """The actor cannot be brought up now; its monitor keeps trying."""
        self._note_outcome(actor, error)
        if isinstance(error, UserError):  # waiting does not help: its checkpoint is gone, or does not fit
            self._cluster_state.set_problem(actor, str(error))
        operation_id = self._restores.get(actor)
        if operation_id is not None:
            self._log.update(operation_id, detail=f"the last attempt failed: {error}")

    def deposed(self, error: StaleRequest) -> None:
        """Another controller has taken over."""
        logger.warning("another controller has taken over: %s", error)
        self._signals.deposed.emit()

    # -- internal --

    def _look_all(self) -> None:
        """Wakes all monitors: there is something new to send to the actors."""
        with self._lock:
            monitors = list(self._monitors.values())
        for monitor in monitors:
            monitor.check()

    def _new_monitor(self, actor: str) -> ActorMonitor:
        return ActorMonitor(
            actor,
            owner=self,
            supervisor=self._supervisor,
            connect=self._connect,
            watch=self._watch,
            health_period_s=self._settings.health_period_s,
            start_timeout_s=self._settings.start_timeout_s,
            load_timeout_s=self._settings.load_timeout_s,
        )

    def _end_restore(self, actor: str, phase: OperationPhase, detail: str = "") -> None:
        with self._lock:
            operation_id = self._restores.pop(actor, None)
        if operation_id is not None:
            self._log.update(operation_id, phase=phase, detail=detail)

    def _note_outcome(self, actor: str, error: MoeClusterError | None) -> None:
        with self._lock:
            self._first_outcomes.setdefault(actor, error)
            if self._awaited <= self._first_outcomes.keys():
                self._all_tried.set()
