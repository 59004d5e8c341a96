"""Counting top-k assignments per layer and logical expert."""

import threading
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


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
