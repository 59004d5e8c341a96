"""Declares metrics in a registry of their own: prefix moecluster_, the labels model and cluster on every series."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

COMMON_LABELS = ("model", "cluster")

M = TypeVar("M", bound=MetricWrapperBase)
Kind = Literal["counter", "gauge"]
Row = tuple[Sequence[str], float]  # values of the labels besides the common ones, and the value


class Declarations:
    """The registry of one process. max_expert_series: most series of one per-expert metric. clock: seconds."""

    def __init__(self, model: str, cluster: str, *, max_expert_series: int, clock: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.common = (model, cluster)
        self.max_expert_series = max_expert_series
        self.clock = clock

    def counter(self, name: str, doc: str, *labels: str) -> Counter:
        """Declares a counter, whose name gets the suffix _total."""
        return Counter(f"moecluster_{name}", doc, (*COMMON_LABELS, *labels), registry=self.registry)

    def gauge(self, name: str, doc: str, *labels: str) -> Gauge:
        """Declares a gauge."""
        return Gauge(f"moecluster_{name}", doc, (*COMMON_LABELS, *labels), registry=self.registry)

    def histogram(self, name: str, doc: str, buckets: Sequence[float], *labels: str) -> Histogram:
        """Declares a histogram. buckets: upper bounds, ascending, without infinity."""
        names = (*COMMON_LABELS, *labels)
        return Histogram(f"moecluster_{name}", doc, names, registry=self.registry, buckets=buckets)

    def collect_from(self, families: Callable[[], Iterable[Metric]]) -> None:
        """Registers metrics that are computed when /metrics is read."""
        self.registry.register(_Computed(families))

    def family(self, kind: Kind, name: str, doc: str, labels: Sequence[str], rows: Iterable[Row]) -> Metric:
        """Returns a computed metric with its series."""
        make = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
        family = make(f"moecluster_{name}", doc, labels=(*COMMON_LABELS, *labels))
        for values, value in rows:
            family.add_metric((*self.common, *values), value)
        return family


class MetricGroup:
    """The metrics of one subject. All groups of a process share its declarations."""

    def __init__(self, declare: Declarations) -> None:
        self._declare = declare
        self._common = declare.common


def children(metric: M, common: tuple[str, str]) -> Callable[..., M]:
    """Returns a function of the labels besides the common ones that gives their series, and remembers it: the metric's
    own look-up takes longer than the count. Not for series that are removed."""
    return cache(partial(metric.labels, *common))


class LayerGauge:
    """A gauge with a series for each MoE layer that has a value."""

    def __init__(self, declare: Declarations, name: str, doc: str, *labels: str) -> None:
        self._gauge = declare.gauge(name, doc, "layer", *labels)
        self._common = declare.common
        self._shown: set[tuple[object, ...]] = set()

    def set(self, layer: int, value: float | None, *labels: str) -> None:
        """Sets a layer's value; None removes its series."""
        key = (layer, *labels)
        if value is not None:
            self._gauge.labels(*self._common, *key).set(value)
            self._shown.add(key)
        elif key in self._shown:
            self._gauge.remove(*self._common, *key)
            self._shown.discard(key)


class _Computed(Collector):
    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def describe(self) -> list[Metric]:
        """Returns nothing, so that the registry does not collect to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._families()
