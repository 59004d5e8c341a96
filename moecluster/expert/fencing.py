"""Fences controller requests by term, and lets a newer load or unload cancel the overlapping part of an older one.

Requests of lower terms are refused, and a running load of a lower term stops. Within a term the newer request wins: an
unload removes its experts from running loads, and a load removes its experts from running unloads.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from moecluster.errors import DeadlineExceeded, StaleRequest
from moecluster.growing import check_ahead
from moecluster.types import ExpertId


class ControllerFence:
    """Thread-safe. Only loads wait, for their turn."""

    def __init__(self) -> None:
        self._term = 0
        self._lock = threading.RLock()
        self._turn = threading.Lock()  # held by the running load
        self._loads: list[AdmittedLoad] = []
        self._unloads: list[AdmittedUnload] = []

    @property
    def loads_under_way(self) -> int:
        """Loads that are carried out or wait for their turn."""
        return len(self._loads)

    @property
    def unloads_under_way(self) -> int:
        """Unloads that have not ended yet."""
        return len(self._unloads)

    @contextmanager
    def admitted(self, term: int) -> Iterator[None]:
        """Fences with the term and admits no other request inside. Raises StaleRequest for a lower term, InvalidMessage
        for one too far ahead."""
        with self._lock:
            self.check(term)
            check_ahead(term, self._term, "term")
            older, self._term = self._term, term
            if older < term:
                for load in self._loads:
                    load.interrupt()
            yield

    def check(self, term: int) -> None:
        """Raises StaleRequest if a higher term has superseded this one."""
        if term < self._term:
            raise StaleRequest(f"controller term {term} is superseded by term {self._term}")

    @contextmanager
    def loading(self, term: int, experts: Sequence[ExpertId], timeout_s: float) -> Iterator["AdmittedLoad"]:
        """Admits a load and waits until earlier loads have ended. Raises StaleRequest, DeadlineExceeded."""
        admitted = AdmittedLoad(self, term, timeout_s)
        with self.admitted(term):
            for unload in self._unloads:
                unload.experts -= set(experts)
            self._loads.append(admitted)
        try:
            if not self._turn.acquire(timeout=max(admitted.left_s, 0.0)):
                raise DeadlineExceeded(f"another load took longer than {timeout_s:g} s")
            try:
                self.check(term)
                yield admitted
            finally:
                self._turn.release()
        finally:
            with self._lock:
                self._loads.remove(admitted)

    @contextmanager
    def unloading(self, term: int, experts: Sequence[ExpertId]) -> Iterator["AdmittedUnload"]:
        """Admits an unload for as long as it runs. Raises StaleRequest."""
        admitted = AdmittedUnload(experts)
        with self.admitted(term):
            for load in self._loads:
                load.dropped |= admitted.experts
            self._unloads.append(admitted)
        try:
            yield admitted
        finally:
            with self._lock:
                self._unloads.remove(admitted)


class AdmittedUnload:
    """experts: those still to drop; read them under ControllerFence.admitted."""

    def __init__(self, experts: Sequence[ExpertId]) -> None:
        self.experts = set(experts)


class AdmittedLoad:
    """A load that waits for its turn or runs."""

    def __init__(self, fence: ControllerFence, term: int, timeout_s: float) -> None:
        self.dropped: set[ExpertId] = set()  # unloaded since the load was requested
        self.interrupt: Callable[[], None] = lambda: None  # called when a higher term supersedes it; must not block
        self._fence = fence
        self._term = term
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        return self._deadline_s - time.monotonic()

    def check(self, expert: ExpertId) -> None:
        """Raises StaleRequest if a higher term has superseded this one, DeadlineExceeded if the time for the load is
        over."""
        self._fence.check(self._term)
        if self.left_s < 0:
            raise DeadlineExceeded(f"{expert}: not loaded within {self._timeout_s:g} s")

    def finish(self, experts: Sequence[ExpertId]) -> None:
        """Raises StaleRequest if some of the experts were unloaded since the load was requested."""
        dropped = [str(expert) for expert in experts if expert in self.dropped]
        if dropped:
            raise StaleRequest(f"unloaded while they were loaded: {', '.join(dropped[:5])} (layer/index)")
