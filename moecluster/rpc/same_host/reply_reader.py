"""Answers that come through a mailbox, read by the very threads that wait for them."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from moecluster.errors import MoeClusterError
from moecluster.rpc.same_host.mailbox import Mailbox
from moecluster.types import ComputeResult


class Answer(Future[ComputeResult]):
    """A future that is waited for with result() only: where there is a mailbox, its thread may have to read it."""

    def __init__(self, readers: "AnswerReaders | None") -> None:
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


class AnswerReaders:
    """Threads that wait for answers of one mailbox: one of them reads for all, the others sleep. Thread-safe.

    A thread of its own for reading would cost each answer a second wake-up, which takes as long as all else that the
    router does for a small batch.
    """

    def __init__(self, mailbox: Mailbox, take: Callable[[bytes], None]) -> None:
        """take: settles what a letter answers."""
        self._mailbox = mailbox
        self._take = take
        self._lock = threading.Lock()
        self._reader: tuple[Answer, int] | None = None  # what it waits for, and its thread
        self._sleepers: dict[threading.Event, Answer] = {}

    def wait_for(self, answer: Answer, timeout_s: float | None) -> None:
        """Until the answer is settled or the timeout over."""
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
                # Asked again: who settles the answer from now on wakes this thread, who did before could not.
                while reads and not answer.done() and (left_s := _left_s(end_s)) != 0.0:
                    letter = self._mailbox.receive(left_s)
                    if letter is not None:
                        self._take(letter)
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
                next(iter(self._sleepers)).set()  # reads from now on

    def settled(self, answer: Answer) -> None:
        """Wakes who waits for the answer."""
        with self._lock:
            for sleeper, awaited in self._sleepers.items():
                if awaited is answer:
                    sleeper.set()
            if self._reader is not None and self._reader[0] is answer and self._reader[1] != threading.get_ident():
                self._mailbox.ring()


def _left_s(end_s: float | None) -> float | None:
    return None if end_s is None else max(end_s - time.monotonic(), 0.0)
