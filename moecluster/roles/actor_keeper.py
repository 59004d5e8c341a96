"""Keeps one expert actor served: finds it, loads its experts, looks after it, and begins again when it is lost."""

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from moecluster.errors import DeadlineExceeded, Exhausted, MoeClusterError, StaleOrder, Unavailable
from moecluster.roles.standing_versions import StandingVersions
from moecluster.rpc.interfaces import ExpertControl
from moecluster.types import ActorAddress, ActorState, ExpertActorStatus, ExpertId, WeightVersion

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
HANGS_AFTER = 2  # looks without an answer
MAX_PREPARED_AT_ONCE = 32  # experts of a weight version, between two looks


class ActorSupervisor(Protocol):
    """What starts expert actors, and starts them again when they die."""

    def address_of(self, actor: str, timeout_s: float) -> ActorAddress | None:
        """Where the actor listens now; waits while it is started again. None after the timeout."""

    def restart(self, actor: str) -> None:
        """Ends a process that hangs, so that a new one takes its place. Never raises."""

    def known(self) -> tuple[str, ...]:
        """The expert actors that are there, or are being started."""

    def create(self, actor: str, *, avoid_nodes: Collection[str] = ()) -> None:
        """Asks for a new actor; it comes when there is room for it. Fine if it is there already."""

    def remove(self, actor: str) -> None:
        """Ends an actor for good. Fine if it is gone already."""

    def draining_nodes(self) -> frozenset[str]:
        """Nodes that will be taken away soon."""


class ControlConnection(ExpertControl, Protocol):
    """Orders to one life of an expert actor, over a connection. Every order ends within a finite time."""

    def close(self) -> None:
        """Ends the connection."""


class LifeWatch(Protocol):
    """Looks out for the end of one life of an actor."""

    def close(self) -> None:
        """Ends the watch."""


Connect = Callable[[ActorAddress], ControlConnection]
Watch = Callable[[ActorAddress, Callable[[], None]], LifeWatch]


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What stands now, as actors are told it."""

    term: int
    generation: int
    versions: StandingVersions
    dtype: str  # empty: the checkpoint's
    picture: bytes = b""  # what the controller leaves with its actors for its successor


class KeeperOwner(Protocol):
    """The controller, as a keeper sees it."""

    def orders(self) -> Orders:
        """What stands now."""

    def assigned(self, actor: str) -> frozenset[ExpertId]:
        """What the actor shall hold."""

    def kept(self, actor: str) -> frozenset[ExpertId]:
        """What the actor may hold: what it shall, and what is being loaded there to stand later."""

    def lost(self) -> frozenset[ExpertId]:
        """Experts that nobody serves: they are loaded first."""

    def settled(self) -> bool:
        """Whether routers had the time to take a placement of this controller: what it leaves out may be unloaded."""

    def actor_up(
        self,
        address: ActorAddress,
        held: Collection[ExpertId],
        *,
        versions: tuple[WeightVersion, ...],
        complete: bool,
    ) -> None:
        """The actor serves these experts in these versions; complete: all that it shall hold."""

    def actor_prepared(
        self, address: ActorAddress, version: int, experts: Collection[ExpertId], *, loaded_bytes: int
    ) -> None:
        """The actor holds these experts in the version that is next; loaded_bytes: since the last time."""

    def preparing_failed(self, actor: str, version: int, error: MoeClusterError) -> None:
        """The actor cannot load the version that is next now; the keeper goes on trying."""

    def actor_loaded(self, actor: str, loaded_bytes: int) -> None:
        """The actor has loaded experts after its start."""

    def actor_reports(self, address: ActorAddress, status: ExpertActorStatus) -> None:
        """The actor answered a look."""

    def actor_down(self, actor: str) -> None:
        """The actor that was up is lost."""

    def actor_failed(self, actor: str, error: MoeClusterError) -> None:
        """The actor cannot be brought up now; the keeper goes on trying."""

    def deposed(self, error: StaleOrder) -> None:
        """An actor has seen a higher term: another controller has taken over."""


class ActorKeeper:
    """One thread that keeps one actor. Orders to the actor are given by this thread alone, so they arrive in order."""

    def __init__(
        self,
        actor: str,
        *,
        owner: KeeperOwner,
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
        self._phase = "restarting"
        self._num_experts = 0
        self._lives = 0
        self._silent = 0  # looks in a row that met with silence
        self._surplus: frozenset[ExpertId] = frozenset()  # what the actor held too much when its life was begun
        self._thread = threading.Thread(target=self._run, name=f"keeper-{actor}", daemon=True)

    def read(self, timeout_s: float) -> ExpertActorStatus | None:
        """What the actor says of itself, before any order; None if it does not answer. For a new controller."""
        address = self._supervisor.address_of(self.actor, timeout_s)
        if address is None:
            return None
        try:
            control = self._connect(address)
        except MoeClusterError:
            return None
        try:
            return control.status(with_picture=True)
        except MoeClusterError:
            return None
        finally:
            control.close()

    def start(self) -> None:
        """Begins to keep the actor."""
        self._thread.start()

    def look(self) -> None:
        """Look after the actor now: it may be gone, or there is something new to tell it."""
        self._wake.set()

    def let_go(self) -> None:
        """As close, without waiting for the thread, which may be waiting for the actor."""
        self._closed.set()
        self._wake.set()

    def close(self) -> None:
        """Leaves the actor alone, as it is."""
        self.let_go()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=self._health_period_s + 10.0)

    def state(self) -> ActorState:
        """The actor as it was last seen."""
        address = self._address
        return ActorState(
            actor=self.actor,
            address=address.address if address else "",
            incarnation=address.incarnation if address else "",
            phase=self._phase,
            experts=self._num_experts if self._phase == "serving" else 0,
            restarts=max(self._lives - 1, 0),
        )

    def _run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._closed.is_set():
            try:
                self._keep_one_life()
                backoff_s = FIRST_BACKOFF_S
            except StaleOrder as exc:
                self._owner.deposed(exc)
                return
            except MoeClusterError as exc:
                self._silent += isinstance(exc, DeadlineExceeded)
                logger.info("%s is not served: %s", self.actor, exc)
                self._owner.actor_failed(self.actor, exc)
                self._closed.wait(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _keep_one_life(self) -> None:
        """From finding the actor to losing it. Raises a MoeClusterError if it could not be brought up."""
        self._phase = "restarting"
        if self._silent >= HANGS_AFTER:
            logger.warning("%s hangs: ending it, so that it starts again", self.actor)
            self._supervisor.restart(self.actor)
            self._silent = 0
        address = self._supervisor.address_of(self.actor, self._start_timeout_s)
        if address is None:
            raise Unavailable(f"{self.actor} was not started within {self._start_timeout_s:g} s")
        if self._closed.is_set():
            return
        control = self._connect(address)
        try:
            self._phase = "loading"
            try:
                told = self._load(control, address)
            except MoeClusterError:
                self._owner.actor_down(self.actor)  # it may serve a part by now
                raise
            if self._address is None or self._address.incarnation != address.incarnation:
                self._lives += 1
            self._address = address
            self._phase = "serving"
            life = self._watch(address, self.look)
            try:
                self._look_after(control, address, told)
            finally:
                life.close()
        finally:
            control.close()
        if not self._closed.is_set():
            self._phase = "restarting"
            self._owner.actor_down(self.actor)

    def _load(self, control: ExpertControl, address: ActorAddress) -> Orders:
        """Fences the actor and makes it hold what it shall, what nobody serves first. Returns what it was told."""
        orders = self._owner.orders()
        self._tell(control, orders)
        status = control.status()
        assigned = self._owner.assigned(self.actor)
        self._surplus = frozenset(set(status.experts).union(*status.other_versions.values())) - self._owner.kept(
            self.actor
        )
        held = set(assigned).intersection(*(status.held(v.version) for v in orders.versions.written_with))
        lost = self._owner.lost()
        parts = [part for part in (assigned & lost - held, assigned - lost - held) if part]
        if not parts:
            self._owner.actor_up(address, held, versions=orders.versions.written_with, complete=True)
        for part in parts:
            orders = self._load_part(control, orders, sorted(part))
            held |= part
            self._owner.actor_up(address, held, versions=orders.versions.written_with, complete=held == assigned)
        self._num_experts = len(held)
        return orders

    def _load_part(self, control: ExpertControl, orders: Orders, experts: Sequence[ExpertId]) -> Orders:
        while True:
            for version in orders.versions.written_with:
                loaded_bytes = self._load_version(control, orders, version, experts, replace=True)
                self._owner.actor_loaded(self.actor, loaded_bytes)
            before, orders = orders, self._owner.orders()
            if set(orders.versions.written_with) <= set(before.versions.written_with):
                return before  # what it was told; else the checkpoint moved on while loading: load the new one
            self._tell(control, orders)

    def _load_version(
        self,
        control: ExpertControl,
        orders: Orders,
        version: WeightVersion,
        experts: Sequence[ExpertId],
        *,
        replace: bool,
    ) -> int:
        return control.load(
            term=orders.term,
            experts=experts,
            checkpoint=version.checkpoint,
            weight_version=version.version,
            dtype=orders.dtype,
            replace=replace,
            timeout_s=self._load_timeout_s,
        )

    def _prepare(
        self,
        control: ExpertControl,
        address: ActorAddress,
        orders: Orders,
        assigned: frozenset[ExpertId],
        status: ExpertActorStatus,
    ) -> bool:
        """Loads a part of what the actor lacks of the next version, beside what it serves. True if there is more.

        In parts, so that the actor is looked after meanwhile. Raises Unavailable, StaleOrder.
        """
        version = orders.versions.next
        if version is None:
            return False
        held = set(status.held(version.version))
        missing = sorted(assigned - held)
        part = [expert for expert in missing if expert.layer == missing[0].layer][:MAX_PREPARED_AT_ONCE]
        loaded_bytes = 0
        try:
            if part:
                loaded_bytes = self._load_version(control, orders, version, part, replace=False)
        except Unavailable:
            raise
        except StaleOrder as exc:
            logger.info("%s did not load weight version %d: %s", self.actor, version.version, exc)
            self._tell(control, orders)  # which another controller's actor refuses; else experts were moved meanwhile
            return True
        except MoeClusterError as exc:
            logger.info("%s does not load weight version %d: %s", self.actor, version.version, exc)
            self._owner.preparing_failed(self.actor, version.version, exc)
            return False
        self._owner.actor_prepared(address, version.version, held.union(part), loaded_bytes=loaded_bytes)
        return len(part) < len(missing)

    def _unload_surplus(self, control: ExpertControl, orders: Orders) -> None:
        """Not at once: a predecessor's placement, by which routers still went, may have named it."""
        surplus, self._surplus = self._surplus - self._owner.kept(self.actor), frozenset()
        if surplus:
            control.unload(term=orders.term, experts=sorted(surplus))

    def _tell(self, control: ExpertControl, orders: Orders) -> None:
        control.set_placement(
            term=orders.term,
            generation=orders.generation,
            checkpoint=orders.versions.checkpoint,
            picture=orders.picture,
            weight_version=orders.versions.weight_version,
            weight_versions=[v.version for v in orders.versions.all],
        )

    def _look_after(self, control: ExpertControl, address: ActorAddress, told: Orders) -> None:
        """Asks for the actor's status over and over, and tells it what is new, until it is lost, hangs or is closed."""
        while True:
            self._wake.wait(self._health_period_s)
            self._wake.clear()
            if self._closed.is_set():
                return
            try:
                orders = self._owner.orders()
                if orders != told:
                    self._tell(control, orders)
                    told = orders
                assigned = self._owner.assigned(self.actor)
                status = control.status()
                self._silent = 0
                self._num_experts = len(status.experts)
                self._owner.actor_reports(address, status)
                if self._surplus and self._owner.settled():
                    self._unload_surplus(control, orders)
                if self._prepare(control, address, orders, assigned, status):
                    self._wake.set()
            except Exhausted:
                continue  # busy, so alive
            except DeadlineExceeded:
                self._silent += 1
                if self._silent < HANGS_AFTER:
                    self._wake.set()
                    continue
                return
            except StaleOrder:
                raise
            except MoeClusterError as exc:
                logger.info("%s is lost: %s", self.actor, exc)
                return
            # Only what was assigned before and after the answer: experts move meanwhile.
            serves = set(status.experts).intersection(*(status.held(v.version) for v in orders.versions.written_with))
            missing = (assigned & self._owner.assigned(self.actor)) - serves
            if status.incarnation != address.incarnation or missing:
                logger.info("%s has lost its experts", self.actor)
                return
