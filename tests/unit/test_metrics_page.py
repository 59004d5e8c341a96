"""The page that Prometheus scrapes, every metric set, at the size of a large model: it and promtool accept it."""

import inspect
import re
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from prometheus_client import disable_created_metrics
from prometheus_client.parser import text_string_to_metric_families

from moecluster.gateway.metrics import GatewayMetrics
from moecluster.metrics import Metrics
from moecluster.types import ExpertId
from tests.support.clusters.prometheus_server import promtool

__all__ = ["promtool"]

LAYERS, EXPERTS = 58, 256
RESERVED = {"histogram": {"le"}, "summary": {"quantile"}}  # labels that belong to one kind of metric alone


def set_all(metrics: Metrics) -> None:
    """One value of everything that a process can show."""
    rng = np.random.default_rng(0)
    for layer in range(LAYERS):
        metrics.count_assignments(layer, rng.integers(0, 10_000, EXPERTS))
        metrics.count_dropped(layer, 3)
        metrics.set_layer_balancedness(layer, 0.9)
        metrics.add_router_entropy(layer, total=12.0, tokens=10)
    metrics.set_replicas({ExpertId(layer=n, index=e): 1 for n in range(LAYERS) for e in range(EXPERTS)})
    metrics.count_computed("expert-0", pairs=10, runs=2, busy_s=0.5)
    metrics.set_queue_rows("expert-0", 4)
    metrics.set_actor_speeds({"expert-0": 1.0})
    metrics.count_dispatch(transport="shm", seconds=0.01, sent_bytes=10, received_bytes=20)
    metrics.count_retry("not_hosted")
    metrics.count_nonfinite_reply(ExpertId(layer=1, index=2), "expert-0")
    metrics.set_generation(7)
    metrics.count_operation("scale", "queued")
    metrics.observe_operation("scale", seconds=1.0)
    metrics.count_moved_bytes(100)
    metrics.count_request("stop")
    metrics.observe_first_token(0.1)
    metrics.observe_next_token(0.05)
    metrics.watch_requests(running=lambda: 1, waiting=lambda: 0)
    metrics.observe_train_step(loss=2.5, aux_losses={"load_balance": 0.02, "router_z": 0.001}, seconds=0.3)
    metrics.count_replay()


def set_all_of_a_gateway(metrics: GatewayMetrics) -> None:
    metrics.add_model("model", "cluster")
    metrics.begin_request()
    metrics.end_request("/v1/completions", 200, model="model")
    metrics.observe_tokens("model", seconds=0.1, count=2, first=True)
    metrics.count_failover("model")
    metrics.set_routers("model", 2)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """An actor's page and a gateway's."""
    disable_created_metrics()
    metrics, gateway = Metrics(model="model", cluster="cluster"), GatewayMetrics()
    set_all(metrics)
    set_all_of_a_gateway(gateway)
    return {"actor": metrics.render(), "gateway": gateway.render().decode()}


@pytest.mark.parametrize(("kind", "set_up"), [(Metrics, set_all), (GatewayMetrics, set_all_of_a_gateway)])
def test_every_metric_is_on_the_pages_below(kind: type, set_up: Callable[[Any], None]) -> None:
    """A metric that is declared later is set here, too."""
    words = {"add", "begin", "count", "end", "observe", "set", "watch"}
    setters = [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name.split("_")[0] in words]
    assert len(setters) > 4
    assert [name for name in setters if f"metrics.{name}(" not in inspect.getsource(set_up)] == []


@pytest.mark.parametrize("page", ["actor", "gateway"])
def test_labels_are_common_to_all_series_and_none_is_reserved(pages: dict[str, str], page: str) -> None:
    names = set()
    for family in text_string_to_metric_families(pages[page]):
        assert family.documentation, family.name
        for sample in family.samples:
            names.add(sample.name)
            assert sample.labels["model"] == "model" and sample.labels["cluster"] == "cluster", sample
            for kind, labels in RESERVED.items():
                assert family.type == kind or not labels & sample.labels.keys(), sample
            assert re.fullmatch(r"moecluster_[a-z_]+", sample.name), sample
    assert len(names) >= (28 if page == "actor" else 7)


@pytest.mark.parametrize("page", ["actor", "gateway"])
def test_promtool_accepts_the_page(promtool: None, pages: dict[str, str], page: str) -> None:
    answer = subprocess.run(
        ["promtool", "check", "metrics"], input=pages[page], capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
