"""Monitors one expert actor: finds it, loads its experts, checks its health, and starts over when it is lost."""

import logging
import threading

from moecluster.controller.actors.interfaces import ActorSupervisor, MonitorOwner, Watch
from moecluster.controller.actors.session import ActorSession
from moecluster.errors import DeadlineExceeded, Exhausted, MoeClusterError, StaleRequest, Unavailable
from moecluster.rpc.expert.interface import Connect, ExpertControl
from moecluster.types import ActorAddress, ActorPhase, ActorState, ExpertActorStatus, ProcessInfo

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
HANGS_AFTER = 2  # health checks without an answer


class ActorMonitor:
    """One thread that monitors one actor. It sends all requests of the monitor, so they arrive in order."""

    def __init__(
        self,
        actor: str,
        *,
        owner: MonitorOwner,
        supervisor: ActorSupervisor,
        connect: Connect,
        watch: Watch,
        health_period_s: float,
        start_timeout_s: float,
        load_timeout_s: float,
    ) -> None:
        self.actor = actor
        self._owner = owner
        self._supervisor = supervisor
        self._connect = connect
        self._watch = watch
        self._health_period_s = health_period_s
        self._start_timeout_s = start_timeout_s
        self._load_timeout_s = load_timeout_s
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._address: ActorAddress | None = None
        self._phase = ActorPhase.RESTARTING
        self._num_experts = 0
        self._incarnations = 0
        self._problem = ""  # why it does not serve
        self._silent = 0  # health checks in a row without an answer
        self._thread = threading.Thread(target=self._run, name=f"monitor-{actor}", daemon=True)

    def read(self, timeout_s: float) -> ExpertActorStatus | None:
        """Returns the actor's status with its snapshot, or None if it does not answer. For a new controller."""
        address = self._supervisor.address_of(self.actor, timeout_s)
        if address is None:
            return None
        try:
            control = self._connect(address)
        except MoeClusterError:
            return None
        try:
            return control.status(with_snapshot=True)
        except MoeClusterError:
            return None
        finally:
            control.close()

    def start(self) -> None:
        """Starts monitoring the actor."""
        self._thread.start()

    def check(self) -> None:
        """Requests a health check now: the actor may be gone, or there is something new to send to it."""
        self._wake.set()

    def let_go(self) -> None:
        """Like close, without waiting for the thread, which may be waiting for the actor."""
        self._closed.set()
        self._wake.set()

    def close(self) -> None:
        """Stops monitoring, and leaves the actor as it is."""
        self.let_go()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=self._health_period_s + 10.0)

    def state(self) -> ActorState:
        """Returns the actor's last known state."""
        address = self._address
        return ActorState(
            actor=self.actor,
            address=address.address if address else "",
            incarnation=address.incarnation if address else "",
            phase=self._phase,
            experts=self._num_experts if self._phase == ActorPhase.SERVING else 0,
            restarts=max(self._incarnations - 1, 0),
            problem=self._problem,
            process=address.process if address else ProcessInfo(),
        )

    def _run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._closed.is_set():
            try:
                self._run_session()
                backoff_s = FIRST_BACKOFF_S
            except StaleRequest as exc:
                self._owner.deposed(exc)
                return
            except MoeClusterError as exc:
                self._silent += isinstance(exc, DeadlineExceeded)
                self._problem = str(exc)
                logger.info("%s does not serve: %s", self.actor, exc)
                self._owner.actor_failed(self.actor, exc)
                self._closed.wait(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _run_session(self) -> None:
        """Runs from finding the actor to losing it. Raises a MoeClusterError if it cannot be brought up."""
        self._phase = ActorPhase.RESTARTING
        if self._silent >= HANGS_AFTER:
            logger.warning("%s hangs: restarting it", self.actor)
            self._supervisor.restart(self.actor)
            self._silent = 0
        address = self._supervisor.address_of(self.actor, self._start_timeout_s)
        if address is None:
            raise Unavailable(f"{self.actor} was not started within {self._start_timeout_s:g} s")
        if self._closed.is_set():
            return
        control = self._connect(address)
        try:
            self._phase = ActorPhase.LOADING
            try:
                session = ActorSession(address, control, owner=self._owner, load_timeout_s=self._load_timeout_s)
                self._num_experts = session.load()
            except MoeClusterError:
                self._owner.actor_down(self.actor)  # it may serve some experts by now
                raise
            if self._address is None or self._address.incarnation != address.incarnation:
                self._incarnations += 1
            self._address = address
            self._phase, self._problem = ActorPhase.SERVING, ""
            watch = self._watch(address, self.check)
            try:
                self._watch_actor(session, control)
            finally:
                watch.close()
        finally:
            control.close()
        if not self._closed.is_set():
            self._phase = ActorPhase.RESTARTING
            self._owner.actor_down(self.actor)

    def _watch_actor(self, session: ActorSession, control: ExpertControl) -> None:
        """Polls the actor's status, and sends it what is new, until it is lost or hangs or the monitor is closed."""
        while True:
            self._wake.wait(self._health_period_s)
            self._wake.clear()
            if self._closed.is_set():
                return
            try:
                session.send_news()
                session.reload(self._owner.to_reload(self.actor))
                assigned = self._owner.assigned(self.actor)
                status = control.status()
                self._silent = 0
                self._num_experts = len(status.experts)
                self._owner.actor_reports(session.address, status)
                session.unload_surplus()
                if session.prepare(assigned, status):
                    self._wake.set()
            except Exhausted:
                continue  # busy, so alive
            except DeadlineExceeded:
                self._silent += 1
                if self._silent < HANGS_AFTER:
                    self._wake.set()
                    continue
                return
            except StaleRequest:
                raise
            except MoeClusterError as exc:
                logger.info("%s is lost: %s", self.actor, exc)
                return
            # Only experts assigned both before and after the answer count: others moved meanwhile.
            missing = (assigned & self._owner.assigned(self.actor)) - session.held_of(status.experts, status)
            if status.incarnation != session.address.incarnation or missing:
                logger.info("%s has lost its experts", self.actor)
                return
