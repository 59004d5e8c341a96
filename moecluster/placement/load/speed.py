"""How fast each expert actor computes, relative to the others: measured, smoothed, and deaf to small differences.

Rows per busy second alone would mislead: an expert costs time each time it is computed (its weights are read), however
few its rows, so an actor of hot experts, with its long batches, looks fast, and would be given still more. So the time
that the work of an actor should have taken is what counts, at costs of an expert's run and of a row that are common to
all actors, and fitted over all readings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from moecluster.placement.layout import Floats


@dataclass(frozen=True, kw_only=True)
class ActorWork:
    """What one life of an actor has computed since its start."""

    rows: float  # (row, expert) pairs
    busy_s: float
    runs: float = 0.0  # times that an expert was computed; 0: not counted


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """When a measured speed counts, and how much of it."""

    half_life_readings: float = 1.0  # a reading so many readings ago weighs half
    min_rows: float = 256.0  # smoothed; with fewer, a speed says more of the batches than of the actor
    dead_band: float = 0.2  # an actor within this of the median counts as the median: batches make such differences
    slowest: float = 0.05  # never planned as slower than this, so that it keeps work to show a recovery by
    fastest: float = 20.0
    costs_half_life_readings: float = 60.0  # for the costs that all actors have in common
    forget_readings: int = 30  # an actor unmeasured for so long counts as the median again: it gets work and shows


@dataclass(frozen=True, kw_only=True)
class _Measured:
    last: ActorWork
    rows: float = 0.0  # smoothed sums of the work between readings
    runs: float = 0.0
    busy_s: float = 0.0
    speed: float = 1.0  # as told
    unmeasured: int = 0  # readings


class SpeedMeter:
    """Speeds relative to the median of the measured actors; 1 for those that are not measured.

    With the default settings an actor that falls to half speed under steady traffic is told from the others at the
    first reading, at 0.67, and is within 15 % of its true speed from the second on; one that recovers counts as equal
    from the fourth reading on. Beyond the dead band, a told speed changes only when it is wrong by more than half the
    band, and goes back to 1 only within half the band, so that noise moves no expert.
    """

    def __init__(self, settings: SpeedSettings | None = None) -> None:
        self._settings = settings or SpeedSettings()
        self._actors: dict[str, _Measured] = {}
        self._costs = _Costs(0.5 ** (1.0 / self._settings.costs_half_life_readings))

    def add(self, work: Mapping[str, ActorWork]) -> None:
        """Takes what every living actor has computed so far. Actors that are not named are forgotten.

        A counter that fell was begun anew. The first that is heard of an actor measures nothing.
        """
        self._costs.age()
        summed = {actor: self._summed(self._actors.get(actor), done) for actor, done in work.items()}
        speeds = {
            actor: self._costs.of(measured.rows, measured.runs) / measured.busy_s
            for actor, measured in summed.items()
            if measured.rows >= self._settings.min_rows and measured.busy_s > 0
        }
        median = float(np.median(list(speeds.values()))) if speeds else 1.0
        self._actors = {
            actor: self._told(measured, speeds[actor] / median) if actor in speeds else self._not_measured(measured)
            for actor, measured in summed.items()
        }

    def speed_A(self, actors: Sequence[str]) -> Floats:
        """Of each actor, in this order: [A], positive; 1 for an actor that was never heard of."""
        return np.array([self._actors[a].speed if a in self._actors else 1.0 for a in actors], dtype=np.float64)

    def _summed(self, before: _Measured | None, done: ActorWork) -> _Measured:
        if before is None:
            return _Measured(last=done)
        begun_anew = done.rows < before.last.rows or done.busy_s < before.last.busy_s
        last = ActorWork(rows=0.0, busy_s=0.0) if begun_anew else before.last
        self._costs.learn(done.rows - last.rows, done.runs - last.runs, done.busy_s - last.busy_s)
        keep = 0.5 ** (1.0 / self._settings.half_life_readings)
        return _Measured(
            last=done,
            rows=before.rows * keep + done.rows - last.rows,
            runs=before.runs * keep + done.runs - last.runs,
            busy_s=before.busy_s * keep + done.busy_s - last.busy_s,
            speed=before.speed,
            unmeasured=before.unmeasured,
        )

    def _told(self, measured: _Measured, speed: float) -> _Measured:
        band, half_band = 1.0 + self._settings.dead_band, 1.0 + self._settings.dead_band / 2
        if _within(speed, 1.0, band if measured.speed == 1.0 else half_band):
            told = 1.0
        elif _within(speed, measured.speed, half_band):
            told = measured.speed
        else:
            told = min(max(speed, self._settings.slowest), self._settings.fastest)
        return _Measured(last=measured.last, rows=measured.rows, runs=measured.runs, busy_s=measured.busy_s, speed=told)

    def _not_measured(self, measured: _Measured) -> _Measured:
        unmeasured = measured.unmeasured + 1
        return _Measured(
            last=measured.last,
            rows=measured.rows,
            runs=measured.runs,
            busy_s=measured.busy_s,
            speed=1.0 if unmeasured >= self._settings.forget_readings else measured.speed,
            unmeasured=unmeasured,
        )


def _within(a: float, b: float, factor: float) -> bool:
    return b / factor <= a <= b * factor


class _Costs:
    """Seconds of a row and of an expert's run, by least squares of the relative error, neither below 0."""

    def __init__(self, keep: float) -> None:
        """keep: the weight of a reading after another one."""
        self._keep = keep
        self._products_22 = np.zeros((2, 2))  # of (rows, runs) per busy second
        self._sums_2 = np.zeros(2)
        self._cost_2: Floats | None = None  # of (a row, a run); None: to be fitted

    def age(self) -> None:
        """Older readings weigh less from now on."""
        self._products_22 *= self._keep
        self._sums_2 *= self._keep

    def learn(self, rows: float, runs: float, busy_s: float) -> None:
        """Work of some actor that took so long."""
        if busy_s > 0 and rows >= 0 and runs >= 0:
            rate_2 = np.array([rows, runs]) / busy_s
            self._products_22 += np.outer(rate_2, rate_2)
            self._sums_2 += rate_2
            self._cost_2 = None

    def of(self, rows: float, runs: float) -> float:
        """Seconds that this work takes at the common costs."""
        if self._cost_2 is None:
            scale_2 = np.sqrt(np.maximum(np.diag(self._products_22), np.finfo(np.float64).tiny))
            left_22 = np.linalg.cholesky(self._products_22 / np.outer(scale_2, scale_2) + 1e-9 * np.eye(2))
            cost_2, _ = nnls(left_22.T, np.linalg.solve(left_22, self._sums_2 / scale_2))
            self._cost_2 = cost_2 / scale_2
        return float(self._cost_2 @ (rows, runs))
