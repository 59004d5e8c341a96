"""The log of operations, current and ended: by id, bounded, with a callback at each change."""

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from moecluster.errors import Exhausted, ResourceError
from moecluster.metrics import Metrics
from moecluster.types import Operation, OperationKind, OperationPhase

MAX_KEPT = 256  # ended operations other than reshares
MAX_KEPT_RESHARES = 32  # ended reshares, of which every drift of the load brings one
MAX_QUEUED = 64  # operations that have not ended


class OperationLog:
    """Operations in order of creation. Thread-safe."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        on_change: Callable[[], None] = lambda: None,
        unix_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """on_change is called after every change, without any lock held. unix_clock: dates operations; clock: measures
        them."""
        self._metrics = metrics
        self._on_change = on_change
        self._unix_clock = unix_clock
        self._clock = clock
        self._lock = threading.Lock()
        self._operations: dict[str, Operation] = {}
        self._reached: dict[str, set[OperationPhase]] = {}  # operation id -> phases that the metrics have counted
        self._began_s: dict[str, float] = {}  # by the clock; not of operations that a predecessor has dated

    def take_over(self, operations: tuple[Operation, ...]) -> None:
        """Takes over a predecessor's operations: queues resumable ones again, and fails the others that have not ended.

        The predecessor has counted the phases that an operation had reached by then.
        """
        failed = []
        with self._lock:
            for operation in operations:
                self._reached[operation.id] = _reached_by(operation.phase)
                if not operation.phase.ended and operation.kind.resumable:
                    operation = dataclasses.replace(operation, phase=OperationPhase.QUEUED, detail="restarted")
                elif not operation.phase.ended:
                    operation = dataclasses.replace(
                        operation,
                        phase=OperationPhase.FAILED,
                        ended_s=self._end_of(operation),
                        detail="the controller was restarted; what it had committed remains",
                    )
                    failed.append(operation)
                self._operations[operation.id] = operation
        for operation in failed:
            self._count(operation)

    def enqueue(
        self, kind: OperationKind, *, reason: str, arguments: tuple[str, ...], operation_id: str = ""
    ) -> Operation:
        """Queues a requested operation. A known id returns the known operation.

        Raises ResourceError if the id belongs to a different request, Exhausted if too many have not ended.
        """
        with self._lock:
            known = self._operations.get(operation_id)
            if known is not None:
                if (known.kind, known.arguments) != (kind, arguments):
                    raise ResourceError(
                        f"operation {operation_id} is {known.kind} {' '.join(known.arguments)} already; give another id"
                    )
                return known
            if sum(not o.phase.ended for o in self._operations.values()) >= MAX_QUEUED:
                raise Exhausted(f"{MAX_QUEUED} operations have not ended yet; try again when some have")
            operation = self._add(kind, OperationPhase.QUEUED, reason, arguments, operation_id)
        self._added(operation)
        return operation

    def begin(self, kind: OperationKind, *, reason: str, arguments: tuple[str, ...] = (), **figures: Any) -> Operation:
        """Adds an operation that starts at once. figures: other fields of it."""
        with self._lock:
            operation = self._add(kind, OperationPhase.PREPARING, reason, arguments, "", **figures)
        self._added(operation)
        return operation

    def update(self, operation_id: str, **changes: Any) -> Operation:
        """Changes fields of an operation, and counts a phase that it reaches."""
        with self._lock:
            before = self._operations[operation_id]
            operation = dataclasses.replace(before, **changes)
            if operation.phase.ended and operation.ended_s is None:
                operation = dataclasses.replace(operation, ended_s=self._end_of(operation))
            self._operations[operation_id] = operation
        if operation.phase is not before.phase:
            self._count(operation)
            if operation.phase is OperationPhase.DONE and operation_id in self._began_s:
                self._metrics.observe_operation(operation.kind, seconds=self._clock() - self._began_s[operation_id])
        if operation.balancedness_measured != before.balancedness_measured:
            self._show_gain(operation)
        self._on_change()
        return operation

    def count_moved(self, operation_id: str, *, loaded_bytes: int, added: int, removed: int) -> None:
        """Adds to an operation's moved bytes and replicas."""
        with self._lock:
            before = self._operations[operation_id]
            self._operations[operation_id] = dataclasses.replace(
                before,
                moved_bytes=before.moved_bytes + loaded_bytes,
                added_replicas=before.added_replicas + added,
                removed_replicas=before.removed_replicas + removed,
            )
        self._metrics.count_moved_bytes(before.kind, loaded_bytes)

    def get(self, operation_id: str) -> Operation:
        """Returns an operation. Raises ResourceError for an unknown id."""
        with self._lock:
            operation = self._operations.get(operation_id)
        if operation is None:
            raise ResourceError(f'no operation "{operation_id}" is known; moecluster operations lists them')
        return operation

    def keeps(self, operation_id: str) -> bool:
        """Whether the operation is still in the log."""
        with self._lock:
            return operation_id in self._operations

    def queued(self, kinds: Collection[OperationKind]) -> tuple[Operation, ...]:
        """Returns the queued operations of these kinds, oldest first."""
        with self._lock:
            return tuple(o for o in self._operations.values() if o.phase is OperationPhase.QUEUED and o.kind in kinds)

    def newest(self, limit: int = 0) -> tuple[Operation, ...]:
        """Returns at most limit operations, newest first; 0: all that are kept."""
        with self._lock:
            found = tuple(reversed(self._operations.values()))
        return found[:limit] if limit else found

    def for_successor(self, limit: int) -> tuple[Operation, ...]:
        """Returns all that have not ended, and at most limit of the newest others, in order of creation."""
        with self._lock:
            ended = [o.id for o in self._operations.values() if o.phase.ended]
            left_out = set(ended[:-limit])
            return tuple(o for o in self._operations.values() if o.id not in left_out)

    def under_way(self) -> tuple[Operation, ...]:
        """Returns the operations that have not ended, oldest first."""
        with self._lock:
            return tuple(o for o in self._operations.values() if not o.phase.ended)

    def _add(
        self,
        kind: OperationKind,
        phase: OperationPhase,
        reason: str,
        arguments: tuple[str, ...],
        operation_id: str,
        **figures: Any,
    ) -> Operation:
        """Under the lock."""
        operation = Operation(
            id=operation_id or f"{kind}-{secrets.token_hex(4)}",
            kind=kind,
            phase=phase,
            reason=reason,
            arguments=arguments,
            created_s=self._unix_clock(),
            **figures,
        )
        self._operations[operation.id] = operation
        self._began_s[operation.id] = self._clock()
        ended = [o for o in self._operations.values() if o.phase.ended]
        reshares = [o.id for o in ended if o.kind is OperationKind.RESHARE]
        others = [o.id for o in ended if o.kind is not OperationKind.RESHARE]
        for old in (*reshares[:-MAX_KEPT_RESHARES], *others[:-MAX_KEPT]):
            del self._operations[old]
            self._reached.pop(old, None)
            self._began_s.pop(old, None)
        return operation

    def age_s(self, operation: Operation) -> float:
        """Returns the seconds since the operation's begin."""
        return self._end_of(operation) - operation.created_s

    def _end_of(self, operation: Operation) -> float:
        """Returns the Unix time of now, by the clock that dated the operation's begin, even if it was set since. For
        one that a predecessor has dated: not before its begin, since hosts' clocks differ."""
        began_s = self._began_s.get(operation.id)
        if began_s is None:
            return max(self._unix_clock(), operation.created_s)
        return operation.created_s + self._clock() - began_s

    def _added(self, operation: Operation) -> None:
        """Without the lock."""
        self._count(operation)
        self._show_gain(operation)
        self._on_change()

    def _show_gain(self, operation: Operation) -> None:
        before = operation.balancedness_before
        if before is not None:
            predicted, measured = operation.balancedness_predicted, operation.balancedness_measured
            self._metrics.set_operation_gain(
                operation.kind,
                predicted=None if predicted is None else predicted - before,
                measured=None if measured is None else measured - before,
            )

    def _count(self, operation: Operation) -> None:
        """Counts a phase that the operation reaches for the first time. Without the lock."""
        with self._lock:
            reached = self._reached.setdefault(operation.id, set())
            if operation.phase in reached:
                return
            reached.add(operation.phase)
        self._metrics.count_operation(operation.kind, operation.phase.value)


def _reached_by(phase: OperationPhase) -> set[OperationPhase]:
    """Returns the phases that an operation in this phase has gone through, this one included."""
    phases = list(OperationPhase)
    return {phase, *phases[: min(phases.index(phase), phases.index(OperationPhase.DONE))]}
