"""Which experts a process shows in its per-expert metrics, if it may not show all."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

EXTREMES = 64  # hottest, and as many coldest
CHOICE_S = 60.0  # how long a choice stands: series that come and go are dear in Prometheus

Experts = Sequence[tuple[int, int]]  # (layer, index)
Values = Mapping[int, npt.NDArray[Any]]  # layer -> by expert


class ShownExperts:
    """Shows all experts up to a limit; beyond it the hottest and the coldest, chosen anew once a minute."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self._limit, self._clock = limit, clock
        self._chosen: Experts = ()
        self._among: Experts = ()
        self._chosen_s = float("-inf")
        self._before: Values = {}  # counters at the last choice

    def of_counters(self, counts: Values, experts: Experts) -> Experts:
        """Returns the experts to show among these, by what their counters gained since the last choice."""
        if len(experts) <= self._limit or not self._is_due(experts):
            return experts if len(experts) <= self._limit else self._chosen
        gained = {layer: _gained(counts_E, self._before.get(layer)) for layer, counts_E in counts.items()}
        self._before = counts
        return self._choose(gained if any(g.any() for g in gained.values()) else counts, experts)

    def of_loads(self, loads: Values, experts: Experts) -> Experts:
        """Returns the experts to show among these, by their loads. An expert without one counts as cold."""
        if len(experts) <= self._limit or not self._is_due(experts):
            return experts if len(experts) <= self._limit else self._chosen
        return self._choose(loads, experts)

    def _is_due(self, experts: Experts) -> bool:
        return self._clock() - self._chosen_s >= CHOICE_S or self._among != experts

    def _choose(self, loads: Values, experts: Experts) -> Experts:
        count = min(EXTREMES, self._limit // 2)
        load_X = np.array([_value(loads, layer, e) for layer, e in experts])
        order_X = np.argsort(-load_X, kind="stable")  # of equals the first, so that a choice does not waver
        ends = np.concatenate([order_X[:count], order_X[len(order_X) - count :]])
        self._chosen = [experts[i] for i in sorted(ends.tolist())]
        self._among, self._chosen_s = experts, self._clock()
        return self._chosen


def _gained(counts_E: npt.NDArray[Any], before_E: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    if before_E is None:
        return counts_E
    gained_E = counts_E.copy()
    gained_E[: len(before_E)] -= before_E
    return gained_E


def _value(loads: Values, layer: int, e: int) -> float:
    load_E = loads.get(layer)
    return float(load_E[e]) if load_E is not None and e < len(load_E) else 0.0
