"""Load windows: assignments per second of every layer and expert, from the routers' cumulative counters.

A router's counters only grow while it lives, so a lost reading loses no counts: the next reading includes them.
Shape letters: L MoE layers in ascending order, E experts of the widest layer (columns beyond a layer's experts stay 0).
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moecluster.errors import InvalidMessage
from moecluster.placement.layout import Floats, Ints

FORGET_HALF_LIVES = 8.0  # anything older weighs under 0.4 % in an exponential window


@dataclass(frozen=True, kw_only=True)
class CounterReading:
    """The counters of all routers at one moment."""

    now_s: float
    tokens: Mapping[str, Mapping[int, Ints]]  # router -> layer -> assignments since the router's start, int64 [E]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Assignments counted between two moments, treated as spread evenly over that time."""

    since_s: float
    until_s: float
    tokens_LE: Ints


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """The last counters received from a router."""

    now_s: float
    tokens_LE: Ints


class CounterGains:
    """Differences of cumulative counters, router by router.

    The first reading of a router only sets its baseline: it may have counted for hours. If one of its counters falls,
    the router was restarted, and all of its counters are taken to start from zero. A router that vanishes adds nothing;
    one that returns within forget_s continues from its last counters, its gain spread over its absence.
    """

    def __init__(self, num_experts: Mapping[int, int], *, forget_s: float) -> None:
        self._num_experts = dict(sorted(num_experts.items()))
        self._forget_s = forget_s
        self._seen: dict[str, _Seen] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return len(self._num_experts), max(self._num_experts.values(), default=0)

    def take(self, reading: CounterReading) -> list[Gain]:
        """Returns the gains of a reading over the earlier ones: one per time at which its routers were last read.

        Raises InvalidMessage, before any change, if a router counts layers or experts that the model does not have.
        """
        counted = {router: self._table(router, layers) for router, layers in reading.tokens.items()}
        by_start: dict[float, Ints] = {}
        for router, tokens_LE in counted.items():
            before = self._seen.get(router)
            self._seen[router] = _Seen(now_s=reading.now_s, tokens_LE=tokens_LE)
            if before is None:
                continue
            restarted = bool((tokens_LE < before.tokens_LE).any())
            gained_LE = tokens_LE if restarted else tokens_LE - before.tokens_LE
            by_start[before.now_s] = by_start.get(before.now_s, 0) + gained_LE
        oldest_s = reading.now_s - self._forget_s
        self._seen = {router: seen for router, seen in self._seen.items() if seen.now_s >= oldest_s}
        return [Gain(since_s=s, until_s=reading.now_s, tokens_LE=gained) for s, gained in by_start.items()]

    def _table(self, router: str, layers: Mapping[int, Ints]) -> Ints:
        unknown = sorted(layers.keys() - self._num_experts.keys())
        if unknown:
            raise InvalidMessage("tokens", f"{router} counts layer {unknown[0]}, which has no experts in this model")
        tokens_LE = np.zeros(self.shape, dtype=np.int64)
        for position, (layer, count) in enumerate(self._num_experts.items()):
            if layer in layers:
                tokens_E = layers[layer]
                if tokens_E.shape != (count,) or (tokens_E < 0).any():
                    raise InvalidMessage(
                        "tokens",
                        f"{router} counts shape {tokens_E.shape} in layer {layer}, "
                        f"expected {count} numbers of at least 0",
                    )
                tokens_LE[position, :count] = tokens_E
        return tokens_LE


class LoadWindow(ABC):
    """Load as of the last reading. Ignores a reading that is not newer; its counts come with the next one."""

    def __init__(self, num_experts: Mapping[int, int], *, forget_s: float) -> None:
        self._gains = CounterGains(num_experts, forget_s=forget_s)
        self._first_s: float | None = None
        self._now_s = 0.0
        self._last_token_s_LE = np.zeros(self._gains.shape)

    def add(self, reading: CounterReading) -> None:
        """Adds a reading. Raises InvalidMessage, and stays unchanged, if the reading does not fit the model."""
        if self._first_s is not None and reading.now_s <= self._now_s:
            return
        gains = self._gains.take(reading)
        if self._first_s is None:
            self._first_s = reading.now_s
            self._last_token_s_LE[:] = reading.now_s
        self._take(gains, reading.now_s)
        self._now_s = reading.now_s
        for gain in gains:
            self._last_token_s_LE[gain.tokens_LE > 0] = reading.now_s

    @property
    def covered_s(self) -> float:
        """Time between the first reading and the last."""
        return 0.0 if self._first_s is None else self._now_s - self._first_s

    @property
    def idle_s_LE(self) -> Floats:
        """Seconds since the reading that last showed a token of the expert; since the first reading if none did."""
        idle_s_LE: Floats = self._now_s - self._last_token_s_LE
        return idle_s_LE

    @property
    def last_token_s(self) -> float:
        """Time of the reading that last showed a token of any expert; that of the first reading if none did."""
        return float(self._last_token_s_LE.max(initial=0.0))

    @property
    @abstractmethod
    def load_LE(self) -> Floats:
        """Assignments per second; 0 until there are two readings."""

    @abstractmethod
    def _take(self, gains: Sequence[Gain], now_s: float) -> None: ...


class SlidingWindow(LoadWindow):
    """The mean over the last window_s, or over the time since the first reading while that is shorter."""

    def __init__(self, num_experts: Mapping[int, int], *, window_s: float) -> None:
        super().__init__(num_experts, forget_s=window_s)
        self._window_s = window_s
        self._kept: deque[Gain] = deque()

    @property
    def tokens_LE(self) -> Floats:
        """Assignments within the window; a gain that began before the window counts in proportion."""
        start_s = self._now_s - self._window_s
        total_LE = np.zeros(self._gains.shape)
        for gain in self._kept:
            inside_s = gain.until_s - max(gain.since_s, start_s)
            total_LE += gain.tokens_LE * (inside_s / (gain.until_s - gain.since_s))
        return total_LE

    @property
    def load_LE(self) -> Floats:
        seconds = min(self._window_s, self.covered_s)
        return self.tokens_LE / seconds if seconds > 0 else np.zeros(self._gains.shape)

    def _take(self, gains: Sequence[Gain], now_s: float) -> None:
        self._kept.extend(gains)
        while self._kept and self._kept[0].until_s <= now_s - self._window_s:
            self._kept.popleft()


class ExponentialWindow(LoadWindow):
    """The mean over all time, where a moment half_life_s ago weighs half as much as now."""

    def __init__(self, num_experts: Mapping[int, int], *, half_life_s: float) -> None:
        super().__init__(num_experts, forget_s=FORGET_HALF_LIVES * half_life_s)
        self._half_life_s = half_life_s
        self._mean_LE = np.zeros(self._gains.shape)

    @property
    def load_LE(self) -> Floats:
        known = 1.0 - self._left_after(self.covered_s)  # corrects for the time before the first reading
        return self._mean_LE / known if known > 0 else np.zeros(self._gains.shape)

    def _take(self, gains: Sequence[Gain], now_s: float) -> None:
        if self._first_s is not None:
            self._mean_LE = self._mean_LE * self._left_after(now_s - self._now_s)
        for gain in gains:
            spread_s = gain.until_s - gain.since_s
            self._mean_LE = self._mean_LE + gain.tokens_LE * ((1.0 - self._left_after(spread_s)) / spread_s)

    def _left_after(self, seconds: float) -> float:
        return float(0.5 ** (seconds / self._half_life_s))


def make_load_window(kind: str, num_experts: Mapping[int, int], window_s: float) -> LoadWindow:
    """Returns a window of kind `controller.window`: sliding over window_s, or exponential with half-life window_s/2."""
    if kind == "sliding":
        return SlidingWindow(num_experts, window_s=window_s)
    assert kind == "exponential", kind
    return ExponentialWindow(num_experts, half_life_s=window_s / 2)
