"""Changes a cluster and kills its actors at random while it serves: a run for faults and soak tests.

changes = RandomChanges(cluster, wanted=experts, checkpoints=copies_of_the_model, seed=0)
changes.run(operations=40, kills=20, duration_s=600)
changes.happened        # what was done, when it began and ended, and its outcome
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from actors.names import CONTROLLER, EXPERT_PREFIX
from moecluster.errors import DeadlineExceeded, Exhausted, MoeClusterError, Unavailable, UserError
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.types import ActorPhase, ControllerStatus, ExpertId, Operation, OperationPhase
from tests.support.clusters.ray_cluster import CREDENTIALS, RayCluster, wait_for_result
from tests.support.soak.cluster_events import ClusterEvent

MIN_ACTORS, MAX_ACTORS = 2, 5
# Counts per 44 operations. More scale-ups than scale-downs, since drains remove actors too.
KINDS = {"scale up": 9, "scale down": 5, "drain": 4, "move": 8, "replicate": 7, "scale to zero": 7, "update": 4}
KILLS = (EXPERT_PREFIX, CONTROLLER, EXPERT_PREFIX)  # two expert actors for each controller
ORDER_PATIENCE_S = 60.0
OPERATION_TIMEOUT_S = 120.0
RECOVERY_TIMEOUT_S = 90.0
POLL_S = 1.0  # between checks for automatic operations
KILL_POLL_S = 0.1  # between checks for a chance to kill
MAX_DELAY_S = 0.4  # of a kill, after the request that it interrupts

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, kw_only=True)
class _Step:
    kind: str
    kill: str  # name prefix of the actor to kill; empty: none
    amid: bool  # kill during the operation, or after it


@dataclass(frozen=True, kw_only=True)
class _Order:
    what: str
    ask: Callable[[ControllerCalls, str], Operation]  # with the operation's id
    seen: Callable[[], bool]  # whether the cluster shows that it was done


class PatientCalls:
    """Calls to the controller at its current address. Thread-safe."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._address = cluster.driver.controller_address()

    def ask(self, question: Callable[[ControllerCalls], AnswerT]) -> AnswerT:
        """Returns the reply; waits while the controller restarts. May call `question` more than once."""
        deadline_s = time.monotonic() + ORDER_PATIENCE_S
        while True:
            try:
                with ControllerCalls(self._address, credentials=CREDENTIALS) as calls:
                    return question(calls)
            except (Unavailable, DeadlineExceeded):
                if time.monotonic() > deadline_s:
                    raise
                with suppress(Unavailable, DeadlineExceeded):
                    self._address = self._cluster.driver.controller_address()
                time.sleep(KILL_POLL_S)


class RandomChanges:
    """One run. Everything random is drawn from the seed; which kill meets which operation depends on timing."""

    def __init__(
        self, cluster: RayCluster, *, wanted: Sequence[ExpertId], checkpoints: Sequence[str], seed: int
    ) -> None:
        """wanted: experts that receive tokens, so that they are loaded again after scaling to zero. checkpoints:
        directories with equal weights, including the served one."""
        self.happened: list[ClusterEvent] = []
        self.refused: list[str] = []  # requests that the cluster refused; others were drawn instead
        self.unordered: dict[str, Operation] = {}  # automatic operations of the controller, by id
        self._cluster = cluster
        self._wanted = sorted(wanted)
        self._checkpoints = checkpoints
        self._choose = random.Random(seed)
        self._calls = PatientCalls(cluster)
        self._seed = seed
        self._ordered: set[str] = set()
        self._recoveries = ThreadPoolExecutor(thread_name_prefix="recovery")
        self._over = threading.Event()

    def run(self, *, operations: int, kills: int, duration_s: float) -> None:
        """Spreads operations and kills over duration_s. Asserts that each operation ends and each actor comes back."""
        steps = self._steps(operations, kills)
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        started_s = time.monotonic()
        recoveries: list[Future[None]] = []
        for number, step in enumerate(steps):
            time.sleep(max(started_s + duration_s * number / len(steps) - time.monotonic(), 0.0))
            recoveries += self._carry_out(f"soak-{self._seed}-{number}", step)
        time.sleep(max(started_s + duration_s - time.monotonic(), 0.0))
        for recovery in recoveries:
            recovery.result(RECOVERY_TIMEOUT_S)
        self._over.set()
        watcher.join(ORDER_PATIENCE_S)
        self._recoveries.shutdown()

    def _steps(self, operations: int, kills: int) -> list[_Step]:
        deck = [kind for kind, count in KINDS.items() for _ in range(count)]
        deck *= -(-operations // len(deck))
        kinds = self._choose.sample(deck, operations) if operations > len(KINDS) else list(KINDS)[:operations]
        met = sorted(self._choose.sample(range(operations), kills))
        victims = {at: KILLS[k % len(KILLS)] for k, at in enumerate(met)}
        amid = {at: k % 2 == 0 for k, at in enumerate(met)}
        return [_Step(kind=kind, kill=victims.get(i, ""), amid=amid.get(i, False)) for i, kind in enumerate(kinds)]

    # -- one step --

    def _carry_out(self, operation_id: str, step: _Step) -> list["Future[None]"]:
        kind, order, operation = self._order(operation_id, step.kind)
        recoveries = []
        begun_s = time.monotonic()
        if step.kill and step.amid:
            time.sleep(self._choose.uniform(0.0, MAX_DELAY_S))
            recoveries.append(self._kill(step.kill, amid=kind))
        while not operation.phase.ended:
            assert time.monotonic() < begun_s + OPERATION_TIMEOUT_S, f"it does not end: {operation}"
            time.sleep(KILL_POLL_S)
            operation = self._look(operation_id, order)
        failure = operation.detail if operation.phase is OperationPhase.FAILED else ""
        if not failure:
            self._wait_shown(order)
        self._note(ClusterEvent(kind=kind, what=order.what, begun_s=begun_s, ended_s=time.monotonic(), failure=failure))
        if step.kill and not step.amid:
            recoveries.append(self._kill(step.kill))
        return recoveries

    def _order(self, operation_id: str, kind: str) -> tuple[str, _Order, Operation]:
        """Draws until the cluster accepts an operation: of this kind if it makes sense now, otherwise of another."""
        while True:
            status = self._status()
            kind = kind if self._makes_sense(kind, status) else self._choose.choice([*KINDS])
            if not self._makes_sense(kind, status):
                continue
            order = self._draw(kind, status)
            self._ordered.add(operation_id)
            try:
                return kind, order, self._calls.ask(lambda calls, order=order: order.ask(calls, operation_id))  # type: ignore[misc]
            except (UserError, Exhausted) as exc:
                self.refused.append(f"{order.what}: {exc}")

    def _wait_shown(self, order: _Order) -> None:
        try:
            wait_for_result(order.seen, f"{order.what} is done and shows")
        except AssertionError as exc:
            newest = "\n".join(map(str, self._calls.ask(lambda calls: calls.operations(8))))
            raise AssertionError(f"{exc}; the newest operations:\n{newest}\n{self._cluster.status()}") from None

    def _look(self, operation_id: str, order: _Order) -> Operation:
        """Returns the operation's state; requests it again if a restarted controller does not know it."""
        try:
            return self._calls.ask(lambda calls: calls.operation(operation_id))
        except UserError:
            return self._calls.ask(lambda calls: order.ask(calls, operation_id))

    def _status(self) -> ControllerStatus:
        """Returns the status, once the controller knows actors."""

        def known() -> ControllerStatus | None:
            status = self._calls.ask(lambda calls: calls.status())
            return status if status.actors else None

        return wait_for_result(known, "the controller knows its actors")

    @staticmethod
    def _makes_sense(kind: str, status: ControllerStatus) -> bool:
        actors = len(status.actors)
        if kind == "scale up":
            return actors < MAX_ACTORS
        return actors > MIN_ACTORS if kind in ("scale down", "drain") else True

    def _draw(self, kind: str, status: ControllerStatus) -> _Order:
        actors = [actor.actor for actor in status.actors]
        if kind.startswith("scale ") and kind != "scale to zero":
            size = len(actors) + (1 if kind == "scale up" else -1)
            return _Order(
                what=f"scale {size}",
                ask=lambda calls, name: calls.scale(size, operation_id=name),
                seen=lambda: len(self._status().actors) == size,
            )
        if kind == "drain":
            actor = self._choose.choice(actors)
            return _Order(
                what=f"drain {actor}",
                ask=lambda calls, name: calls.drain(actor, operation_id=name),
                seen=lambda: actor not in self._cluster.driver.actors(),
            )
        if kind == "update":
            checkpoint = self._choose.choice([path for path in self._checkpoints if path != status.checkpoint])
            self._cluster.driver.give_directory(checkpoint)
            return _Order(
                what=f"update {checkpoint.rpartition('/')[2]}",
                ask=lambda calls, name: calls.update(checkpoint, operation_id=name),
                seen=lambda: self._status().checkpoint == checkpoint,
            )
        expert = self._choose.choice(self._wanted)
        count = {"move": 1, "replicate": 2, "scale to zero": 0}[kind]
        onto = sorted(self._choose.sample(actors, min(count, len(actors))))
        return _Order(
            what=f"place {expert} on {', '.join(onto) or 'no actor'}",
            ask=lambda calls, name: calls.place(expert, onto, operation_id=name),
            seen=lambda: self._status().cold_experts == 0,  # tokens bring it back
        )

    # -- kills --

    def _kill(self, prefix: str, *, amid: str = "") -> "Future[None]":
        """Sends SIGKILL to one of the actors; the future ends when it serves again, or is removed for good."""
        actor, pid = wait_for_result(lambda: self._victim(prefix), f"there is an actor to kill, {prefix}*")
        begun_s = time.monotonic()
        kind = f"kill {'controller' if prefix == CONTROLLER else 'expert'}"

        def recover() -> None:
            wait_for_result(lambda: self._recovered(actor, pid), f"{actor} is back", RECOVERY_TIMEOUT_S)
            self._note(ClusterEvent(kind=kind, what=actor, begun_s=begun_s, ended_s=time.monotonic(), amid=amid))

        return self._recoveries.submit(recover)

    def _victim(self, prefix: str) -> tuple[str, int] | None:
        """Kills the process of an actor; returns (actor, pid), or None if no actor has a process."""
        names = [name for name in self._cluster.driver.actors() if name.startswith(prefix)]
        self._choose.shuffle(names)
        for name in names:
            pid = self._cluster.pids(1.0, names=[name]).get(name)
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return name, pid
        return None

    def _recovered(self, actor: str, killed: int) -> bool:
        if actor == CONTROLLER:
            return self._cluster.status() is not None
        if actor not in self._cluster.driver.actors():
            return True  # it was drained, or removed by scaling down
        pid = self._cluster.pids(1.0, names=[actor]).get(actor, killed)
        status = self._cluster.status()
        return (
            pid != killed
            and status is not None
            and all(a.phase is ActorPhase.SERVING for a in status.actors if a.actor == actor)
        )

    # -- what was seen --

    def _note(self, event: ClusterEvent) -> None:
        self.happened.append(event)
        took_s, amid = event.ended_s - event.begun_s, f" amid {event.amid}" * bool(event.amid)
        failed = f", FAILED: {event.failure}" * bool(event.failure)
        print(f"{took_s:6.1f} s  {event.kind}: {event.what}{amid}{failed}")

    def _watch(self) -> None:
        """Collects automatic operations before the controller drops them."""
        while not self._over.wait(POLL_S):
            with suppress(MoeClusterError):
                found = self._calls.ask(lambda calls: calls.operations(0))
                self.unordered |= {o.id: o for o in found if o.id not in self._ordered}
