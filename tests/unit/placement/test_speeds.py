"""Measured speeds: a straggler is detected and forgotten in time, and noise changes nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecluster.placement.load.speed import SpeedMeter, SpeedSettings
from moecluster.types import ActorWork

ACTORS = ("a", "b", "c", "d", "e")


class Cluster:
    """Actors whose counters grow by a reading's rows, at their speed in rows per second."""

    def __init__(self, meter: SpeedMeter) -> None:
        self.meter = meter
        self.done = dict.fromkeys(ACTORS, ActorWork())

    def read(self, *, rows: int = 1000, speeds: dict[str, float] | None = None, times: int = 1) -> np.ndarray:
        for _ in range(times):
            for actor, before in self.done.items():
                busy_s = rows / (100.0 * (speeds or {}).get(actor, 1.0))
                self.done[actor] = ActorWork(computed_rows=before.computed_rows + rows, busy_s=before.busy_s + busy_s)
            self.meter.add(self.done)
        return self.meter.speed_A(ACTORS)


def test_a_straggler_is_found_at_the_first_reading_and_known_at_the_second() -> None:
    cluster = Cluster(SpeedMeter())
    assert cluster.read(times=5).tolist() == [1.0] * 5
    first = cluster.read(speeds={"b": 0.5})
    assert first[1] < 0.7 and first[[0, 2, 3, 4]].tolist() == [1.0] * 4
    second = cluster.read(speeds={"b": 0.5})
    assert second[1] == pytest.approx(0.5, rel=0.15)


def test_a_straggler_that_recovers_is_forgotten_by_the_fourth_reading() -> None:
    cluster = Cluster(SpeedMeter())
    cluster.read(speeds={"b": 0.5}, times=10)
    cluster.read(times=3)
    assert cluster.read().tolist() == [1.0] * 5


def test_few_rows_measure_nothing_and_an_old_measure_ends() -> None:
    settings = SpeedSettings(min_rows=256, forget_readings=4)
    cluster = Cluster(SpeedMeter(settings))
    assert cluster.read(rows=20, speeds={"b": 0.1}, times=9).tolist() == [1.0] * 5
    cluster.read(speeds={"b": 0.5}, times=10)
    told = cluster.read(rows=0, times=2)
    assert told[1] == pytest.approx(0.5, rel=0.1)
    assert cluster.read(rows=0, times=8).tolist() == [1.0] * 5


def test_a_uniformly_slower_cluster_has_no_straggler() -> None:
    cluster = Cluster(SpeedMeter())
    cluster.read(times=3)
    assert cluster.read(speeds=dict.fromkeys(ACTORS, 0.3), times=3).tolist() == [1.0] * 5


def test_uneven_machines_are_told_apart() -> None:
    cluster = Cluster(SpeedMeter())
    told = cluster.read(speeds={"a": 4.0, "b": 2.0, "e": 1e-6}, times=20)
    assert told[:4] == pytest.approx([4.0, 2.0, 1.0, 1.0])
    assert told[4] == SpeedSettings().slowest


def test_an_actor_that_was_started_anew_and_one_never_heard_of() -> None:
    cluster = Cluster(SpeedMeter())
    cluster.read(speeds={"b": 0.5}, times=6)
    cluster.done["b"] = ActorWork()
    told = cluster.read(times=4)
    assert told.tolist() == [1.0] * 5
    assert cluster.meter.speed_A(["nobody"]).tolist() == [1.0]
    cluster.meter.add({"a": cluster.done["a"]})
    assert cluster.meter.speed_A(["b"]).tolist() == [1.0]


@given(noise=st.lists(st.lists(st.floats(0.92, 1.08), min_size=5, max_size=5), min_size=3, max_size=30))
def test_noise_within_the_dead_band_is_not_told(noise) -> None:
    cluster = Cluster(SpeedMeter())
    for speeds in noise:
        told = cluster.read(speeds=dict(zip(ACTORS, speeds, strict=True)))
        assert told.tolist() == [1.0] * 5


@given(noise=st.lists(st.floats(0.97, 1.03), min_size=1, max_size=30), speed=st.sampled_from([0.3, 0.82, 0.84, 3.0]))
def test_a_told_speed_changes_seldom_under_noise(noise, speed) -> None:
    cluster = Cluster(SpeedMeter())
    cluster.read(speeds={"c": speed}, times=20)
    told = [float(cluster.read(speeds={"c": speed * factor})[2]) for factor in noise]
    assert len(set(told)) <= 2
    assert all(0.05 <= value <= 20.0 for value in told)


class CostlyRuns:
    """Actors of equal speed, where each run of an expert costs as much as 50 rows; the first has hot experts."""

    def __init__(self, meter: SpeedMeter) -> None:
        self.meter = meter
        self.done = dict.fromkeys(ACTORS, ActorWork())
        self._drawn = np.random.default_rng(0)

    def read(self, *, speeds: dict[str, float] | None = None, times: int = 1) -> np.ndarray:
        for _ in range(times):
            for actor, before in self.done.items():
                rows = round((20_000 if actor == "a" else 1_000) * self._drawn.uniform(0.8, 1.2))
                runs = round(400 * self._drawn.uniform(0.8, 1.2))
                busy_s = (rows + 50.0 * runs) / 1e4 / (speeds or {}).get(actor, 1.0)
                self.done[actor] = ActorWork(
                    computed_rows=before.computed_rows + rows,
                    expert_runs=before.expert_runs + runs,
                    busy_s=before.busy_s + busy_s,
                )
            self.meter.add(self.done)
        return self.meter.speed_A(ACTORS)


def test_an_actor_of_hot_experts_is_not_taken_for_a_fast_one() -> None:
    assert CostlyRuns(SpeedMeter()).read(times=10).tolist() == [1.0] * 5


@pytest.mark.parametrize("straggler", ["a", "b"])
def test_a_straggler_is_found_whether_its_experts_are_hot_or_not(straggler: str) -> None:
    cluster = CostlyRuns(SpeedMeter())
    cluster.read(times=5)
    told = dict(zip(ACTORS, cluster.read(speeds={straggler: 0.5}, times=3), strict=True))
    assert told.pop(straggler) == pytest.approx(0.5, rel=0.25)
    assert set(told.values()) == {1.0}
