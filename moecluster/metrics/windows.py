"""Statistics over a sliding window, of two halves: the last full one and the current one."""

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(kw_only=True)
class _Half:
    total: float = 0.0
    count: int = 0
    highest: float = float("-inf")


class WindowStats:
    """Mean and maximum over the last window_s to 2 * window_s; idle time between values does not clear it.

    Thread-safe."""

    def __init__(self, window_s: float, clock: Callable[[], float]) -> None:
        self._window_s, self._clock = window_s, clock
        self._began_s = clock()
        self._before, self._now = _Half(), _Half()
        self._lock = threading.Lock()

    def add(self, total: float, count: int = 1) -> None:
        """Adds values. total: their sum. count: at least 1."""
        with self._lock:
            now_s = self._clock()
            if now_s - self._began_s >= self._window_s:
                self._before, self._now, self._began_s = self._now, _Half(), now_s
            self._now.total += total
            self._now.count += count
            self._now.highest = max(self._now.highest, total / count)

    @property
    def mean(self) -> float:
        """Mean of the values; at least one was added."""
        return (self._before.total + self._now.total) / (self._before.count + self._now.count)

    @property
    def highest(self) -> float:
        """The highest of the means that were added."""
        return max(self._before.highest, self._now.highest)
