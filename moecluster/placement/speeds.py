"""How fast each expert actor computes, relative to the others: measured, smoothed, and deaf to small differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moecluster.placement.layout import Floats


@dataclass(frozen=True, kw_only=True)
class ActorWork:
    """What one life of an actor has computed since its start."""

    rows: float  # (row, expert) pairs
    busy_s: float


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """When a measured speed counts, and how much of it."""

    half_life_readings: float = 1.0  # a reading so many readings ago weighs half
    min_rows: float = 256.0  # smoothed; with fewer, a speed says more of the batches than of the actor
    dead_band: float = 0.2  # an actor within this of the median counts as the median: batches make such differences
    slowest: float = 0.05  # never planned as slower than this, so that it keeps work to show a recovery by
    fastest: float = 20.0
    forget_readings: int = 30  # an actor unmeasured for so long counts as the median again: it gets work and shows


@dataclass(frozen=True, kw_only=True)
class _Measured:
    last: ActorWork
    rows: float = 0.0  # smoothed sums of the work between readings
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

    def add(self, work: Mapping[str, ActorWork]) -> None:
        """Takes what every living actor has computed so far. Actors that are not named are forgotten.

        A counter that fell was begun anew. The first that is heard of an actor measures nothing.
        """
        summed = {actor: self._summed(self._actors.get(actor), done) for actor, done in work.items()}
        speeds = {
            actor: measured.rows / measured.busy_s
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
        keep = 0.5 ** (1.0 / self._settings.half_life_readings)
        return _Measured(
            last=done,
            rows=before.rows * keep + done.rows - last.rows,
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
        return _Measured(last=measured.last, rows=measured.rows, busy_s=measured.busy_s, speed=told)

    def _not_measured(self, measured: _Measured) -> _Measured:
        unmeasured = measured.unmeasured + 1
        return _Measured(
            last=measured.last,
            rows=measured.rows,
            busy_s=measured.busy_s,
            speed=1.0 if unmeasured >= self._settings.forget_readings else measured.speed,
            unmeasured=unmeasured,
        )


def _within(a: float, b: float, factor: float) -> bool:
    return b / factor <= a <= b * factor
