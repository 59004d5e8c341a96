"""docs/metrics.md: every metric, out of the registries of an actor's process and of a gateway."""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from moecluster.gateway.metrics import GatewayMetrics
from moecluster.metrics import Metrics
from moecluster.metrics.declare import COMMON_LABELS
from tests.support.every_metric import set_all, set_all_of_a_gateway
from tools.markdown import table

ROOT = Path(__file__).resolve().parent.parent
TRAINING = "training"
GATEWAY = "gateway"
# Package -> the process that runs it.
PROCESSES = {
    "expert": "expert actor",
    "dispatch": "router",
    "router": "router",
    "training": TRAINING,
    "controller": "controller",
    GATEWAY: "gateway",
}
UNITS = ("seconds", "bytes")
LAYERS, EXPERTS, MAX_EXPERT_SERIES = 1, 3, 2  # so that experts are left out, and quantiles are shown


@dataclass(frozen=True, kw_only=True)
class ShownMetric:
    """A metric as Prometheus shows it."""

    name: str
    kind: str
    labels: tuple[str, ...]  # besides those that all have
    help: str
    buckets: tuple[str, ...]  # upper bounds, of a histogram
    processes: tuple[str, ...]

    @property
    def unit(self) -> str:
        """As its name says; empty for counts and ratios."""
        return next((unit for unit in UNITS if self.name.removesuffix("_total").endswith(f"_{unit}")), "")


def metrics_page() -> str:
    """The page in Markdown."""
    actors, gateway = actor_metrics(), gateway_metrics()
    histograms = [metric for metric in (*actors, *gateway) if metric.buckets]
    return "\n".join(
        [
            "# Metrics",
            "",
            "<!-- Written by tools/generate_reference_pages.py: run `make docs`, do not edit. -->",
            "",
            "Every actor exports its metrics for Prometheus at `/metrics`. `moecluster status` shows the ports, and",
            "[`cluster.metrics_port`](configuration.md#cluster) sets them. The gateway exports its metrics at",
            "`/metrics` of its HTTP port. Both take a token with the scope `read`, or the cluster's secret",
            "([security](security.md#credentials)). The controller lists all processes at `/sd`, so that a server with",
            "[prometheus.yml](../clusters/prometheus.yml) follows a cluster that grows and shrinks;",
            "[prometheus-rules.yml](../clusters/prometheus-rules.yml) has alerts.",
            "",
            "Every series has the labels `model`, the name that the model is served under (`serve.model_name`), and",
            "`cluster`, the name of the cluster (`cluster.name`). Prometheus adds `process`, the name of the process,",
            "and `role`. A label means the same everywhere: `layer` and `expert` are those of the model, `actor` names",
            "an expert actor, `kind` is an operation's. A series appears with its first value. A histogram has the",
            "series `_bucket` (with the label `le`), `_sum` and `_count`.",
            "",
            "## Actors",
            "",
            "Training runs in the first router's process, and exports its metrics there.",
            "",
            *table(HEAD, map(_row, actors)),
            "",
            "## Gateway",
            "",
            *table(HEAD, map(_row, gateway)),
            "",
            "## Buckets",
            "",
            "Upper bounds of the histograms' buckets, in seconds; `+Inf` is the last of each.",
            "",
            *table(("Histogram", "Buckets"), ((f"`{each.name}`", ", ".join(each.buckets)) for each in histograms)),
            "",
        ]
    )


HEAD = ("Metric", "Type", "Labels", "Unit", "Exported by", "What it is")


def _row(metric: ShownMetric) -> tuple[str, ...]:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return (f"`{metric.name}`", metric.kind, labels, metric.unit, ", ".join(metric.processes), metric.help)


def actor_metrics() -> list[ShownMetric]:
    """Of the processes of actors, in the order of their declaration."""
    metrics = Metrics(model="model", cluster="cluster", max_expert_series=MAX_EXPERT_SERIES)
    recorder = _Recorder(metrics, metrics.registry)
    set_all(cast(Metrics, recorder), layers=LAYERS, experts=EXPERTS)
    return _shown(recorder, {package: process for package, process in PROCESSES.items() if package != GATEWAY})


def gateway_metrics() -> list[ShownMetric]:
    """Of the gateway's process, in the order of their declaration."""
    metrics = GatewayMetrics()
    recorder = _Recorder(metrics, metrics.registry)
    set_all_of_a_gateway(cast(GatewayMetrics, recorder))
    return _shown(recorder, {GATEWAY: PROCESSES[GATEWAY]})


class _Recorder:
    """Passes calls on to a metrics object, and notes which of its methods set which metric."""

    def __init__(self, metrics: object, registry: CollectorRegistry) -> None:
        self._metrics = metrics
        self.registry = registry
        self._from_start = {name for name, samples in self._samples().items() if samples}
        self.setters: dict[str, set[str]] = {}  # metric -> methods; none: it is set from the start

    def __getattr__(self, method: str) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            before = self._samples()
            getattr(self._metrics, method)(*arguments, **options)
            for name, samples in self._samples().items():
                if samples != before.get(name) and name not in self._from_start:
                    self.setters.setdefault(name, set()).add(method)

        return call

    def _samples(self) -> dict[str, list[Sample]]:
        return {family.name: family.samples for family in self.registry.collect()}


def _shown(recorder: _Recorder, processes: Mapping[str, str]) -> list[ShownMetric]:
    users = _users(processes)
    found = []
    for family in recorder.registry.collect():
        if methods := recorder.setters.get(family.name):
            by = {process for method in methods for process in users.get(method, ())}
            assert by, f"{family.name}: no process sets it"
        else:
            by = {*processes.values()} - {TRAINING}
        found.append(_metric(family, tuple(process for process in dict.fromkeys(processes.values()) if process in by)))
    return found


def _metric(family: Metric, processes: tuple[str, ...]) -> ShownMetric:
    labels = {label: None for sample in family.samples for label in sample.labels}
    assert set(COMMON_LABELS) <= labels.keys(), f"{family.name} has no value in tests/support/every_metric.py"
    bounds = [sample.labels["le"] for sample in family.samples if "le" in sample.labels]
    return ShownMetric(
        name=f"{family.name}_total" if family.type == "counter" else family.name,
        kind=family.type,
        labels=tuple(label for label in labels if label not in (*COMMON_LABELS, "le")),
        help=family.documentation,
        buckets=tuple(bound.removesuffix(".0") for bound in dict.fromkeys(bounds) if bound != "+Inf"),
        processes=processes,
    )


def _users(processes: Mapping[str, str]) -> dict[str, set[str]]:
    """Method of a metrics object -> the processes whose code has `metrics.method`, whatever holds the object."""
    found: dict[str, set[str]] = {}
    for package, process in processes.items():
        for method in _used(ROOT / "moecluster" / package):
            found.setdefault(method, set()).add(process)
    return found


def _used(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)) if "metrics." in source else ():
            match node:
                case ast.Attribute(value=ast.Name(id=held) | ast.Attribute(attr=held), attr=method):
                    if held.endswith("metrics"):
                        yield method
