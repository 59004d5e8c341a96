"""Loads from a real Prometheus that scrapes real endpoints lead to the same decisions as direct reports."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import pytest

from moecluster.addresses import ListenAddress
from moecluster.controller.load.direct import DirectLoadSource, LoadSource, SourceReading
from moecluster.controller.load.prometheus import PrometheusLoadSource
from moecluster.controller.load.prometheus_client import PrometheusServer
from moecluster.errors import ConfigError, MoeClusterError, Unavailable
from moecluster.metrics import Metrics
from moecluster.placement.layout import Fleet, Ints, Layout, make_layout
from moecluster.placement.load.speed import SpeedMeter
from moecluster.placement.load.window import ExponentialWindow, LoadWindow, SlidingWindow
from moecluster.placement.policy.interface import Decision, Observation
from moecluster.placement.policy.registry import policy_named
from moecluster.rpc.metrics_server import MetricsServer
from moecluster.simulation.layouts import contiguous_layout
from moecluster.types import ActorWork, ExpertId, LoadSnapshot
from tests.support.clusters.prometheus_server import SCRAPED, RunningPrometheus
from tests.support.known import known

CLUSTER = "cluster"
LAYER_EXPERTS = {1: 8, 3: 6}
ACTORS = {"expert-0": 1.0, "expert-1": 1.0, "expert-2": 2.0}  # busy seconds for BATCH_ROWS
BATCH_ROWS = 4000
# Between decisions, on the tests' own clock. Readings are dated by scrapes, of a second ago at most: 1 % of it.
PERIOD_S = 100.0
LOAD_TOLERANCE = 0.02
WAIT_S = 60.0


class Process:
    """The metrics endpoint of an expert actor, which holds every expert, on its own port."""

    def __init__(self, *, cluster: str = CLUSTER, port: int = 0, max_expert_series: int = 1000) -> None:
        self.metrics = Metrics(model="served", cluster=cluster, max_expert_series=max_expert_series)
        self.hosted: dict[int, Collection[int]] = {layer: range(experts) for layer, experts in LAYER_EXPERTS.items()}
        self.metrics.watch_replicas("expert", lambda: self.hosted)
        self.server = MetricsServer(self.metrics, credentials=SCRAPED, listen=ListenAddress(port=port))
        self.address, self.port = self.server.address, self.server.port

    def compute(self, layer: int, tokens_E: Ints | Sequence[int]) -> None:
        """Counts tokens of the experts that it holds."""
        held = sorted(self.hosted[layer])
        self.metrics.count_replica_tokens(layer, held, [int(tokens_E[e]) for e in held])

    @property
    def shown_tokens(self) -> int:
        """All computed tokens on the page."""
        lines = self.metrics.render().splitlines()
        return int(
            sum(float(line.split()[-1]) for line in lines if line.startswith("moecluster_replica_tokens_total{"))
        )


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes and ends them after the test."""
    with ExitStack() as started:

        def start(*, cluster: str = CLUSTER, port: int = 0, max_expert_series: int = 1000) -> Process:
            process = Process(cluster=cluster, port=port, max_expert_series=max_expert_series)
            started.callback(process.server.close)
            return process

        yield start


class Cluster:
    """Two routers under drifting Zipf traffic and three actors, one of them slow. All counts go to their pages and to a
    direct source."""

    def __init__(self, start: Start) -> None:
        self.direct = DirectLoadSource(LAYER_EXPERTS)
        self._start = start
        self.actors = {name: self._start_actor(name) for name in ACTORS}
        self._work = dict.fromkeys(ACTORS, ActorWork())
        self._rng = np.random.default_rng(7)

    @property
    def addresses(self) -> list[str]:
        return [process.address for process in self.actors.values()]

    def restart_actor(self, name: str) -> None:
        """Restarts an actor at the same address: its counters begin at 0 again."""
        self.actors[name].server.close()
        self.actors[name] = self._start_actor(name, port=self.actors[name].port)
        self._work[name] = ActorWork()

    def _start_actor(self, name: str, port: int = 0) -> Process:
        """Each holds a third of the experts of each layer."""
        process = self._start(port=port)
        process.hosted = {
            layer: range(list(ACTORS).index(name), experts, len(ACTORS)) for layer, experts in LAYER_EXPERTS.items()
        }
        return process

    def pass_period(self, period: int) -> None:
        """Adds the tokens and the work of one period."""
        for name in ("router-0", "router-1"):
            counts = zipf_counts(3000 + 1000 * period, hottest=2 - period // 3, rng=self._rng)
            for layer, counts_E in counts.items():
                for actor in self.actors.values():
                    actor.compute(layer, counts_E)
            self.direct.add(name, LoadSnapshot(tokens=by_expert(counts)))
        for name, busy_s in ACTORS.items():
            before = self._work[name]
            self.actors[name].metrics.count_computed(name, pairs=BATCH_ROWS, runs=1, busy_s=busy_s)
            self._work[name] = ActorWork(
                computed_rows=before.computed_rows + BATCH_ROWS,
                expert_runs=before.expert_runs + 1,
                busy_s=before.busy_s + busy_s,
            )
            self.direct.set_work(name, self._work[name])

    def is_told_by(self, reading: SourceReading) -> bool:
        """Whether a reading includes everything that the pages show now."""
        tokens = sum(actor.shown_tokens for actor in self.actors.values())
        rows = {name: work.computed_rows for name, work in self._work.items()}
        return total(reading) == tokens and {n: w.computed_rows for n, w in reading.work.items()} == rows


class Planner:
    """Decides by the readings of one source."""

    def __init__(self, window: LoadWindow) -> None:
        self.window = window
        self.meter = SpeedMeter()

    def decide(self, reading: SourceReading) -> Decision:
        """A decision of policy `share`, always from the same current layout."""
        self.window.add(reading.counters)
        self.meter.add(reading.work)
        fleet = Fleet(
            slots_A=np.array([4, 4, 2]),
            speed_A=self.meter.speed_A(list(ACTORS)),
            node_A=np.arange(3),
            expert_bytes_L=np.array([1e6, 1e6]),
        )
        seen = Observation(
            now_s=reading.counters.now_s,
            load_LE=self.window.load_LE,
            fleet=fleet,
            layout=current_layout(fleet),
            budget_bytes=1e9,
        )
        policy = policy_named("share")
        return policy.decide(seen, policy.first_state())[0]


def current_layout(fleet: Fleet) -> Layout:
    """Experts in order, plus a second and a third replica of expert 0 of each layer in spare slots."""
    row = contiguous_layout(np.array(list(LAYER_EXPERTS.values())), fleet)
    layout = make_layout(
        row.num_experts_L,
        np.append(row.layer_R, [0, 0, 1, 1]),
        np.append(row.expert_R, [0, 0, 0, 0]),
        np.append(row.actor_R, [1, 2, 1, 2]),
        np.append(np.where(row.expert_R == 0, 1 / 3, 1.0), [1 / 3] * 4),
    )
    assert np.bincount(layout.actor_R).tolist() == [7, 7, 4]
    return layout


def zipf_counts(tokens: int, *, hottest: int, rng: np.random.Generator) -> dict[int, Ints]:
    """Layer -> assignments [E], Zipf 1.2, led by expert `hottest`."""
    counts = {}
    for layer, experts in LAYER_EXPERTS.items():
        p_E = np.roll(1.0 / np.arange(1, experts + 1) ** 1.2, hottest)
        counts[layer] = rng.multinomial(tokens, p_E / p_E.sum()).astype(np.int64)
    return counts


def by_expert(counts: Mapping[int, Ints]) -> dict[ExpertId, int]:
    return {
        ExpertId(layer=n, index=e): count for n, counts_E in counts.items() for e, count in enumerate(counts_E.tolist())
    }


def total(reading: SourceReading) -> int:
    return int(sum(tokens_E.sum() for layers in reading.counters.tokens.values() for tokens_E in layers.values()))


def source_of(prometheus: RunningPrometheus, cluster: str = CLUSTER) -> PrometheusLoadSource:
    return PrometheusLoadSource(prometheus.address, cluster=cluster, layer_experts=LAYER_EXPERTS)


def read_until(source: LoadSource, seen: Callable[[SourceReading], bool], now_s: float = 0.0) -> SourceReading:
    """Reads until `seen` is true; returns that reading."""
    deadline_s = time.monotonic() + WAIT_S
    last: SourceReading | MoeClusterError | None = None
    while time.monotonic() < deadline_s:
        try:
            last = source.read(now_s)
            if seen(last):
                return last
        except MoeClusterError as exc:
            last = exc
        time.sleep(0.05)
    pytest.fail(f"not seen within {WAIT_S} s; at last: {last}")


def error_until(source: LoadSource, error: type[MoeClusterError], words: str) -> None:
    """Reads until this error is raised with these words in it."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        try:
            source.read(0.0)
        except error as exc:
            if words in str(exc):
                return
        time.sleep(0.05)
    pytest.fail(f"no {error.__name__} with {words!r} within {WAIT_S} s")


@pytest.mark.parametrize(
    "make_window",
    [
        lambda: ExponentialWindow(LAYER_EXPERTS, half_life_s=PERIOD_S),
        lambda: SlidingWindow(LAYER_EXPERTS, window_s=3 * PERIOD_S),
    ],
    ids=["exponential", "sliding"],
)
def test_both_sources_lead_to_the_same_decisions(
    prometheus: RunningPrometheus, start: Start, make_window: Callable[[], LoadWindow]
) -> None:
    cluster = Cluster(start)
    prometheus.scrape(*cluster.addresses)
    by_scrapes = source_of(prometheus)
    one, other = Planner(make_window()), Planner(make_window())
    for period in range(8):
        if period == 4:
            cluster.restart_actor("expert-1")
        cluster.pass_period(period)
        now_s = PERIOD_S * (period + 1)
        direct = one.decide(cluster.direct.read(now_s))
        scraped = other.decide(read_until(by_scrapes, cluster.is_told_by, now_s))
        np.testing.assert_allclose(other.window.load_LE, one.window.load_LE, rtol=LOAD_TOLERANCE)
        np.testing.assert_array_equal(other.meter.speed_A(list(ACTORS)), one.meter.speed_A(list(ACTORS)))
        np.testing.assert_array_equal(scraped.layout.expert_key_R, direct.layout.expert_key_R)
        np.testing.assert_array_equal(scraped.layout.actor_R, direct.layout.actor_R)
        np.testing.assert_allclose(scraped.layout.share_R, direct.layout.share_R, atol=LOAD_TOLERANCE)
    assert one.meter.speed_A(["expert-2"])[0] == pytest.approx(0.5)  # what they agree on is not trivial
    assert known(direct.balancedness_after) > known(direct.balancedness_before) + 0.05


def test_nothing_is_read_twice_between_two_scrapes(prometheus: RunningPrometheus, start: Start) -> None:
    actor = start()
    actor.compute(1, [1] * 8)
    prometheus.scrape(actor.address)
    source = source_of(prometheus)
    first = read_until(source, lambda reading: total(reading) == 8, now_s=50.0)
    assert 49.0 < first.counters.now_s <= 50.0
    actor.compute(1, [1] * 8)
    second = read_until(source, lambda reading: reading is not first, now_s=60.0)
    assert second.counters.now_s > first.counters.now_s
    read_until(source, lambda reading: total(reading) == 16)


def test_a_cluster_without_series_is_named(prometheus: RunningPrometheus, start: Start) -> None:
    prometheus.scrape(start(cluster="other").address)
    read_until(source_of(prometheus, cluster="other"), lambda reading: True)
    with pytest.raises(Unavailable, match="has no series of cluster 'cluster': it should scrape"):
        source_of(prometheus).read(0.0)


def test_any_name_of_a_cluster_is_only_a_name(prometheus: RunningPrometheus, start: Start) -> None:
    names = ('a"b', "back\\slash", "two\nlines", 'x"} or up{job!="', "größe 🐘", "{}=~.*", "\x01\t", "plain")
    actors = [start(cluster=name) for name in names]
    for i, actor in enumerate(actors):
        actor.compute(1, [i + 1] * 8)
    prometheus.scrape(*(actor.address for actor in actors))
    for i, (name, actor) in enumerate(zip(names, actors, strict=True)):
        reading = read_until(source_of(prometheus, cluster=name), lambda reading: total(reading) > 0)
        assert {r: t[1].tolist() for r, t in reading.counters.tokens.items()} == {
            f"instance={actor.address},job=moecluster": [i + 1] * 8
        }


def test_an_actor_that_leaves_out_replicas_is_not_planned_by(prometheus: RunningPrometheus, start: Start) -> None:
    actor = start(max_expert_series=10)
    actor.hosted = {1: range(8)}
    actor.compute(1, np.arange(8))
    prometheus.scrape(actor.address)
    source = source_of(prometheus)
    read_until(source, lambda reading: total(reading) == 28)  # 8 of 10: all are shown
    actor.hosted = {1: range(8), 3: range(6)}
    error_until(source, ConfigError, "set cluster.max_expert_series to at least 14, or controller.load_source")


def test_what_a_replica_computed_still_counts_when_it_has_moved(prometheus: RunningPrometheus, start: Start) -> None:
    """Or the counters of its former actor would fall, as if that had been restarted."""
    before, after = start(), start()
    before.hosted, after.hosted = {1: range(8)}, {1: ()}
    before.compute(1, [5] * 8)
    prometheus.scrape(before.address, after.address)
    source = source_of(prometheus)
    read_until(source, lambda reading: total(reading) == 40)
    before.hosted, after.hosted = {1: range(1, 8)}, {1: (0,)}
    after.compute(1, [3] * 8)
    moved = read_until(source, lambda reading: total(reading) == 43)
    counted = [layers[1] for layers in moved.counters.tokens.values()]
    assert np.sum(counted, axis=0).tolist() == [8, 5, 5, 5, 5, 5, 5, 5]
    before.hosted = {1: range(8)}
    before.compute(1, [1] * 8)
    read_until(source, lambda reading: total(reading) == 51)


def test_an_actor_that_ends_is_gone_from_the_next_readings(prometheus: RunningPrometheus, start: Start) -> None:
    stays, ends = start(), start()
    for actor in (stays, ends):
        actor.compute(1, [1] * 8)
    prometheus.scrape(stays.address, ends.address)
    source = source_of(prometheus)
    read_until(source, lambda reading: len(reading.counters.tokens) == 2)
    ends.server.close()
    reading = read_until(source, lambda reading: len(reading.counters.tokens) == 1)
    assert list(reading.counters.tokens) == [f"instance={stays.address},job=moecluster"]


def test_of_an_actor_that_was_started_anew_elsewhere_the_new_incarnation_counts(
    prometheus: RunningPrometheus, start: Start
) -> None:
    """Prometheus keeps the old incarnation's page until a scrape fails."""
    old = start()
    old.metrics.count_computed("expert-0", pairs=100, runs=3, busy_s=5.0)
    new = start()
    new.metrics.count_computed("expert-0", pairs=7, runs=2, busy_s=1.0)
    prometheus.scrape(new.address, old.address)
    source, server = source_of(prometheus), PrometheusServer(prometheus.address, timeout_s=5.0)
    both = f'count(moecluster_actor_tokens_total{{cluster="{CLUSTER}"}})'
    read_until(source, lambda reading: server.query(both)[0].value == 2)
    found = source.read(0.0).work["expert-0"]
    assert (found.computed_rows, found.busy_s) == (7, 1.0)
    new.server.close()
    back = read_until(source, lambda reading: reading.work["expert-0"] != found).work["expert-0"]
    assert (back.computed_rows, back.busy_s) == (100, 5.0)
