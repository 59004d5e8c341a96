"""Counts the tokens that this router sends to each expert, and reports them to the controller once per window."""

import threading
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from moecluster.types import ExpertId, LoadSnapshot


class LoadCounts:
    """Assignments counted since the start. Thread-safe."""

    def __init__(self) -> None:
        self._layers: dict[int, npt.NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    def add(self, layer: int, counts_E: npt.NDArray[np.int64]) -> None:
        with self._lock:
            total = self._layers.get(layer)
            self._layers[layer] = counts_E.copy() if total is None else total + counts_E

    def snapshot(self) -> Mapping[int, npt.NDArray[np.int64]]:
        """Layer -> assignments per expert."""
        with self._lock:
            return dict(self._layers)


Counts = Mapping[int, npt.NDArray[np.int64]]  # layer -> assignments per expert [E]


class LoadReporter:
    """A thread that reports the counts since the last report; a window without tokens is not reported."""

    def __init__(self, loads: LoadCounts, report: Callable[[LoadSnapshot], None], *, window_s: float = 1.0) -> None:
        self._loads = loads
        self._report = report
        self._window_s = window_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load-reporter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops reporting."""
        self._closed.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        before = self._loads.snapshot()
        while not self._closed.wait(self._window_s):
            now = self._loads.snapshot()
            tokens = difference(now, before)
            if tokens:
                self._report(LoadSnapshot(tokens=tokens))
            before = now


def difference(now: Counts, before: Counts) -> dict[ExpertId, int]:
    """Assignments counted between two snapshots; experts that got none are left out."""
    tokens = {}
    for layer, counts_E in now.items():
        earlier_E = before.get(layer)
        gained_E = counts_E if earlier_E is None else counts_E - earlier_E
        for index in np.flatnonzero(gained_E):
            tokens[ExpertId(layer=layer, index=int(index))] = int(gained_E[index])
    return tokens
