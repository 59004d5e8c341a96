"""The queue of batches in an expert actor: bounded in bytes, merged across routers."""

import threading
import time
from collections import deque
from collections.abc import Set
from dataclasses import dataclass

from moecluster.errors import Exhausted, Unavailable
from moecluster.rpc.expert.interface import Reply
from moecluster.types import ComputeBatch, ExpertId, Phase

MAX_MERGED_ROWS = 8192


@dataclass(frozen=True, kw_only=True, eq=False)
class Waiting:
    """A batch in the queue; equal to itself only."""

    batch: ComputeBatch
    reply: Reply
    arrived_s: float  # time.monotonic

    @property
    def expired(self) -> bool:
        return time.monotonic() - self.arrived_s > self.batch.deadline_s


def _size_bytes(batch: ComputeBatch) -> int:
    rows = batch.x_ND.numel() * batch.x_ND.element_size()
    return rows if batch.grad_ND is None else 2 * rows


def _mergeable(head: ComputeBatch, other: ComputeBatch) -> bool:
    """Only forward batches of one layer, version, dtype, width and reply kind; training keeps its graphs and order."""
    return (
        other.phase is Phase.FORWARD
        and other.layer == head.layer
        and other.weight_version == head.weight_version
        and other.unsummed == head.unsummed
        and other.x_ND.dtype == head.x_ND.dtype
        and other.x_ND.shape[1] == head.x_ND.shape[1]
    )


class ComputeQueue:
    """FIFO, except that a forward batch takes along mergeable batches of the same layer. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._waiting: deque[Waiting] = deque()
        self._taken: list[Waiting] = []  # taken last, not answered yet
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def rows(self) -> int:
        """Rows of the queued batches."""
        with self._changed:
            return sum(len(w.batch.x_ND) for w in self._waiting)

    def wants(self, experts: Set[ExpertId]) -> bool:
        """Whether a batch that is queued or being computed needs one of the experts."""
        with self._changed:
            return any(
                ExpertId(layer=waiting.batch.layer, index=index) in experts
                for waiting in (*self._waiting, *self._taken)
                for index in waiting.batch.experts
            )

    def put(self, waiting: Waiting, *, wake: bool = True) -> None:
        """Adds a batch; an empty queue takes any size. Raises Exhausted beyond max_bytes, Unavailable once closed."""
        size_bytes = _size_bytes(waiting.batch)
        with self._changed:
            if self._closed:
                raise Unavailable("the expert actor has ended")
            if self._bytes and self._bytes + size_bytes > self._max_bytes:
                raise Exhausted(f"{self._bytes} bytes wait, at most {self._max_bytes}")
            self._bytes += size_bytes
            self._waiting.append(waiting)
            if wake:
                self._changed.notify()

    def wait(self) -> bool:
        """Blocks until a batch is queued; returns False once the queue is closed and empty."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait(1.0)
            return bool(self._waiting)

    def wake(self) -> None:
        """Wakes a thread in wait() for batches that were put with wake=False."""
        with self._changed:
            if self._waiting:
                self._changed.notify()

    def take(self) -> list[Waiting]:
        """The next batch and the batches that can be computed with it; empty if the queue is."""
        with self._changed:
            if not self._waiting:
                return []
            taken = [self._waiting.popleft()]
            head = taken[0].batch
            if head.phase is Phase.FORWARD and self._waiting:
                self._take_along(taken)
            self._bytes -= sum(_size_bytes(w.batch) for w in taken)
            self._taken = taken
            return taken

    def done(self) -> None:
        """Reports that the batches taken last have been answered."""
        with self._changed:
            self._taken = []

    def _take_along(self, taken: list[Waiting]) -> None:
        head, rows = taken[0].batch, len(taken[0].batch.x_ND)
        left: deque[Waiting] = deque()
        for waiting in self._waiting:
            rows_with = rows + len(waiting.batch.x_ND)
            if _mergeable(head, waiting.batch) and rows_with <= MAX_MERGED_ROWS:
                taken.append(waiting)
                rows = rows_with
            else:
                left.append(waiting)
        self._waiting = left

    def close(self) -> None:
        """Ends wait() once the batches still queued are taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
