"""The scraped page with every metric set, at the size of a large model: Prometheus and promtool accept it."""

import inspect
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import disable_created_metrics
from prometheus_client.parser import text_string_to_metric_families

from moecluster.gateway.metrics import GatewayMetrics
from moecluster.metrics import Metrics
from tests.support.clusters.prometheus_server import promtool
from tests.support.every_metric import set_all, set_all_of_a_gateway

__all__ = ["promtool"]

LAYERS, EXPERTS = 58, 256
RESERVED = {"histogram": {"le"}, "summary": {"quantile"}}  # labels reserved for one kind of metric


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """An actor's page and a gateway's."""
    disable_created_metrics()
    metrics, gateway = Metrics(model="model", cluster="cluster"), GatewayMetrics()
    set_all(metrics, layers=LAYERS, experts=EXPERTS)
    set_all_of_a_gateway(gateway)
    return {"actor": metrics.render(), "gateway": gateway.render().decode()}


@pytest.mark.parametrize(("kind", "set_up"), [(Metrics, set_all), (GatewayMetrics, set_all_of_a_gateway)])
def test_every_metric_is_on_the_pages_below(kind: type, set_up: Callable[[Any], None]) -> None:
    """Fails if a newly declared metric is not set here."""
    words = {"add", "begin", "count", "end", "observe", "set", "watch"}
    setters = [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name.split("_")[0] in words]
    assert len(setters) > 4
    source = inspect.getsource(inspect.getmodule(set_up) or set_up)
    assert [name for name in setters if f"metrics.{name}(" not in source] == []


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
