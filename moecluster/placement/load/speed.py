"""Measures how fast each expert actor computes relative to the others: smoothed, ignoring small differences.

Rows per busy second alone would mislead: each run of an expert has a fixed cost (its weights are read), however few its
rows, so an actor of hot experts, with its long batches, looks fast and would be given even more. Instead, an actor's
speed is the time that its work should have taken, divided by the time it took. The costs of an expert run and of a row
are common to all actors and fitted over all readings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from moecluster.placement.layout import Floats
from moecluster.types import ActorWork


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """Thresholds and smoothing of the speed measurement."""

    half_life_readings: float = 1.0  # a reading this many readings ago weighs half
    min_rows: float = 256.0  # smoothed; with fewer rows, a speed depends more on the batches than on the actor
    dead_band: float = 0.2  # an actor within this of the median counts as the median: batches cause such differences
    slowest: float = 0.05  # lower bound of a speed, so that a slow actor keeps work and can show a recovery
    fastest: float = 20.0
    costs_half_life_readings: float = 60.0  # for the costs that all actors have in common
    forget_readings: int = 30  # after so many unmeasured readings an actor counts as the median: it gets work again


@dataclass(frozen=True, kw_only=True)
class _Measured:
    last: ActorWork
    rows: float = 0.0  # smoothed sums of the work between readings
    runs: float = 0.0
    busy_s: float = 0.0
    speed: float = 1.0  # as reported
    unmeasured: int = 0  # readings


class SpeedMeter:
    """Speeds relative to the median of the measured actors; 1 for actors that are not measured.

    With the default settings an actor that falls to half speed under steady traffic is reported at 0.67 at the first
    reading, and within 15 % of its true speed from the second on; one that recovers counts as equal from the fourth
    reading on. Beyond the dead band, a reported speed changes only when it is wrong by more than half the band, and
    returns to 1 only within half the band, so that noise moves no expert.
    """

    def __init__(self, settings: SpeedSettings | None = None) -> None:
        self._settings = settings or SpeedSettings()
        self._actors: dict[str, _Measured] = {}
        self._costs = _Costs(0.5 ** (1.0 / self._settings.costs_half_life_readings))

    def add(self, work: Mapping[str, ActorWork]) -> None:
        """Adds what every living actor has computed so far. Actors missing from `work` are forgotten.

        A counter that fell was reset. The first reading of an actor only sets its baseline.
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
            actor: self._reported(measured, speeds[actor] / median) if actor in speeds else self._not_measured(measured)
            for actor, measured in summed.items()
        }

    def speed_A(self, actors: Sequence[str]) -> Floats:
        """Returns the speed of each actor, in this order: [A], positive; 1 for an unknown actor."""
        return np.array([self._actors[a].speed if a in self._actors else 1.0 for a in actors], dtype=np.float64)

    def _summed(self, before: _Measured | None, done: ActorWork) -> _Measured:
        if before is None:
            return _Measured(last=done)
        begun_anew = done.computed_rows < before.last.computed_rows or done.busy_s < before.last.busy_s
        last = ActorWork() if begun_anew else before.last
        rows, runs = done.computed_rows - last.computed_rows, done.expert_runs - last.expert_runs
        busy_s = done.busy_s - last.busy_s
        self._costs.learn(rows, runs, busy_s)
        keep = 0.5 ** (1.0 / self._settings.half_life_readings)
        return _Measured(
            last=done,
            rows=before.rows * keep + rows,
            runs=before.runs * keep + runs,
            busy_s=before.busy_s * keep + busy_s,
            speed=before.speed,
            unmeasured=before.unmeasured,
        )

    def _reported(self, measured: _Measured, speed: float) -> _Measured:
        band, half_band = 1.0 + self._settings.dead_band, 1.0 + self._settings.dead_band / 2
        if _within(speed, 1.0, band if measured.speed == 1.0 else half_band):
            reported_speed = 1.0
        elif _within(speed, measured.speed, half_band):
            reported_speed = measured.speed
        else:
            reported_speed = min(max(speed, self._settings.slowest), self._settings.fastest)
        return _Measured(
            last=measured.last, rows=measured.rows, runs=measured.runs, busy_s=measured.busy_s, speed=reported_speed
        )

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
    """Seconds per row and per expert run, by non-negative least squares of the relative error."""

    def __init__(self, keep: float) -> None:
        """keep: factor applied to the weight of all earlier readings at each new one."""
        self._keep = keep
        self._products_22 = np.zeros((2, 2))  # of (rows, runs) per busy second
        self._sums_2 = np.zeros(2)
        self._cost_2: Floats | None = None  # of (a row, a run); None: to be fitted

    def age(self) -> None:
        """Decays the weight of earlier readings."""
        self._products_22 *= self._keep
        self._sums_2 *= self._keep

    def learn(self, rows: float, runs: float, busy_s: float) -> None:
        """Adds one actor's work and the time it took."""
        if busy_s > 0 and rows >= 0 and runs >= 0:
            rate_2 = np.array([rows, runs]) / busy_s
            self._products_22 += np.outer(rate_2, rate_2)
            self._sums_2 += rate_2
            self._cost_2 = None

    def of(self, rows: float, runs: float) -> float:
        """Returns the seconds that this work takes at the common costs."""
        if self._cost_2 is None:
            scale_2 = np.sqrt(np.maximum(np.diag(self._products_22), np.finfo(np.float64).tiny))
            left_22 = np.linalg.cholesky(self._products_22 / np.outer(scale_2, scale_2) + 1e-9 * np.eye(2))
            cost_2, _ = nnls(left_22.T, np.linalg.solve(left_22, self._sums_2 / scale_2))
            self._cost_2 = cost_2 / scale_2
        return float(self._cost_2 @ (rows, runs))
