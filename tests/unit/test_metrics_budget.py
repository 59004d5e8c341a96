"""The series of a large cluster: 58 layers of 256 experts, 8 routers, 64 expert actors, one gateway."""

from collections.abc import Callable

import pytest
from prometheus_client import disable_created_metrics
from prometheus_client.parser import text_string_to_metric_families

from moecluster.gateway.metrics import GatewayMetrics
from moecluster.metrics import Metrics
from moecluster.metrics.dispatch import MAX_NONFINITE_SERIES
from tests.support.every_metric import (
    set_all_of_a_controller,
    set_all_of_a_gateway,
    set_all_of_a_router,
    set_all_of_an_expert_actor,
    set_all_of_training,
)

LAYERS, EXPERTS = 58, 256
ROUTERS, ACTORS = 8, 64
ROOM = 1.5  # slots of an actor / replicas that it needs
MAX_OF_A_PROCESS, MAX_OF_ALL = 2_000, 50_000
ADDED_BY_PROMETHEUS = 5  # up, scrape_duration_seconds, ... of each target
NAMES = tuple(f"expert-{i}" for i in range(ACTORS))


def router(metrics: Metrics) -> None:
    """The first one trains as well, and at worst every label of its retries and lanes is in use."""
    set_all_of_a_router(metrics, layers=LAYERS, experts=EXPERTS, actors=NAMES, sick=MAX_NONFINITE_SERIES + 1)
    set_all_of_training(metrics)


def controller(metrics: Metrics) -> None:
    set_all_of_a_controller(metrics, layers=LAYERS, experts=EXPERTS, actors=NAMES)


def expert_actor(metrics: Metrics) -> None:
    held = int(ROOM * EXPERTS / ACTORS)
    set_all_of_an_expert_actor(metrics, layers=LAYERS, experts=EXPERTS, actor="expert-63", held=held)


@pytest.fixture(scope="module")
def series() -> dict[str, int]:
    """Kind of process -> series on its page."""
    disable_created_metrics()
    found = {}
    kinds: tuple[Callable[[Metrics], None], ...] = (router, controller, expert_actor)
    for set_up in kinds:
        metrics = Metrics(model="model", cluster="cluster")
        set_up(metrics)
        found[set_up.__name__] = count(metrics.render())
    gateway = GatewayMetrics()
    set_all_of_a_gateway(gateway)
    return found | {"gateway": count(gateway.render().decode())}


def count(page: str) -> int:
    return sum(len(family.samples) for family in text_string_to_metric_families(page))


def test_no_process_of_a_large_cluster_has_more_than_2000_series(series: dict[str, int]) -> None:
    assert {kind: found for kind, found in series.items() if found >= MAX_OF_A_PROCESS} == {}


def test_a_large_cluster_has_fewer_than_50000_series_in_all(series: dict[str, int]) -> None:
    processes = {"router": ROUTERS, "controller": 1, "expert_actor": ACTORS, "gateway": 1}
    total = sum(number * (series[kind] + ADDED_BY_PROMETHEUS) for kind, number in processes.items())
    assert 10_000 < total < MAX_OF_ALL, series


def test_the_actors_show_all_replicas_that_the_prometheus_load_source_plans_by() -> None:
    """So the budget holds whichever load source is used."""
    metrics = Metrics(model="model", cluster="cluster")
    expert_actor(metrics)
    page = metrics.render()
    assert page.count("moecluster_replica_tokens_total{") == LAYERS * int(ROOM * EXPERTS / ACTORS)
    assert 'moecluster_hidden_replicas{actor="expert-63",cluster="cluster",model="model"} 0.0' in page
