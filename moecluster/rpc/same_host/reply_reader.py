"""Replies through a mailbox, read by the threads that wait for them."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from moecluster.errors import MoeClusterError
from moecluster.rpc.same_host.mailbox import Mailbox
from moecluster.types import ComputeResult


class Answer(Future[ComputeResult]):
    """A future to wait for with result() only: with a mailbox, the waiting thread may have to read it."""

    def __init__(self, readers: "ReplyReaders | None") -> None:
        super().__init__()
        self._readers = readers

    def result(self, timeout: float | None = None) -> ComputeResult:
        if self._readers is None:
            return super().result(timeout)
        self._readers.wait_for(self, timeout)
        return super().result(0.0)

    def settle(self, outcome: ComputeResult | MoeClusterError) -> None:
        """Sets the result or the error, from any thread."""
        if isinstance(outcome, MoeClusterError):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)
        if self._readers is not None:
            self._readers.settled(self)


class ReplyReaders:
    """Threads that wait for replies of one mailbox: one of them reads for all, the others sleep. Thread-safe.

    A dedicated reader thread would cost each reply a second wake-up, which takes as long as everything else that the
    router does for a small batch.
    """

    def __init__(self, mailbox: Mailbox, take: Callable[[bytes], None]) -> None:
        """take: settles the Answer that a message belongs to."""
        self._mailbox = mailbox
        self._take = take
        self._lock = threading.Lock()
        self._reader: tuple[Answer, int] | None = None  # the reader's Answer and thread
        self._sleepers: dict[threading.Event, Answer] = {}

    def wait_for(self, answer: Answer, timeout_s: float | None) -> None:
        """Waits until the answer is settled or the timeout is over."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not answer.done() and _left_s(end_s) != 0.0:
            sleeper = threading.Event()
            with self._lock:
                reads = self._reader is None
                if reads:
                    self._reader = answer, threading.get_ident()
                else:
                    self._sleepers[sleeper] = answer
            try:
                # Checked again: a thread that settled the answer before we registered could not wake us; later ones do.
                while reads and not answer.done() and (left_s := _left_s(end_s)) != 0.0:
                    message = self._mailbox.receive(left_s)
                    if message is not None:
                        self._take(message)
                if not reads and not answer.done():
                    sleeper.wait(_left_s(end_s))
            finally:
                self._leave(sleeper, reads=reads)

    def _leave(self, sleeper: threading.Event, *, reads: bool) -> None:
        with self._lock:
            if reads:
                self._reader = None
            else:
                del self._sleepers[sleeper]
            if self._reader is None and self._sleepers:
                next(iter(self._sleepers)).set()  # it becomes the reader

    def settled(self, answer: Answer) -> None:
        """Wakes the thread that waits for the answer."""
        with self._lock:
            for sleeper, awaited in self._sleepers.items():
                if awaited is answer:
                    sleeper.set()
            if self._reader is not None and self._reader[0] is answer and self._reader[1] != threading.get_ident():
                self._mailbox.wake()


def _left_s(end_s: float | None) -> float | None:
    return None if end_s is None else max(end_s - time.monotonic(), 0.0)
