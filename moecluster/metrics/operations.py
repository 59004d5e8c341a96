"""Metrics of what the controller does, and of the state of the cluster as it sees it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric

from moecluster.metrics.buckets import STEP_BUCKETS_S
from moecluster.metrics.declare import Declarations, MetricGroup, Row


@dataclass(frozen=True, kw_only=True)
class ClusterFigures:
    """The cluster at one moment."""

    degraded: bool  # an actor does not serve, or an expert is lost
    rebalancing: bool  # an operation changes the placement now
    held: bool  # training holds the placement
    lost_experts: int
    cold_experts: int
    replicas_aside: int  # that returned NaN or infinity
    routers: int
    actors: Mapping[str, int]  # state (an ActorPhase) -> expert actors, all states
    operation_age_s: Mapping[str, float]  # kind -> age of the oldest operation that has not ended
    plan_age_s: float | None  # None: nothing was planned yet
    load_age_s: float | None  # None: no load was read yet


class OperationMetrics(MetricGroup):
    """Set by the controller."""

    def __init__(self, declare: Declarations) -> None:
        super().__init__(declare)
        self._operations = declare.counter(
            "operations",
            "Operations (changes of placement or size) that reached a phase; each counts once per phase",
            "kind",
            "phase",
        )
        self._operation_seconds = declare.histogram(
            "operation_seconds", "Duration of successful operations", STEP_BUCKETS_S, "kind"
        )
        self._operation_gain = declare.gauge(
            "operation_gain",
            "Change of balancedness by the last operation of a kind: predicted before it, measured over the load "
            "window after it",
            "kind",
            "basis",
        )
        self._moved_bytes = declare.counter(
            "moved_bytes", "Bytes of expert weights loaded by operations, failed ones included", "kind"
        )
        self._figures: Callable[[], ClusterFigures] | None = None
        declare.collect_from(self._cluster_series)

    def count_operation(self, kind: str, phase: str) -> None:
        """Adds an operation that reached a phase for the first time. kind and phase as in Operation and
        OperationPhase."""
        self._operations.labels(*self._common, kind, phase).inc()

    def observe_operation(self, kind: str, *, seconds: float) -> None:
        """Adds a successful operation."""
        self._operation_seconds.labels(*self._common, kind).observe(seconds)

    def set_operation_gain(self, kind: str, *, predicted: float | None, measured: float | None) -> None:
        """Sets the gain of balancedness of the last operation of a kind; None: not known, so that of an earlier one
        stays."""
        for basis, gain in (("predicted", predicted), ("measured", measured)):
            if gain is not None:
                self._operation_gain.labels(*self._common, kind, basis).set(gain)

    def count_moved_bytes(self, kind: str, moved_bytes: int) -> None:
        """Adds bytes of expert weights loaded by an operation of a kind."""
        self._moved_bytes.labels(*self._common, kind).inc(moved_bytes)

    def watch_cluster(self, figures: Callable[[], ClusterFigures]) -> None:
        """Shows the state of the cluster; the function is called when /metrics is read."""
        self._figures = figures

    def _cluster_series(self) -> Iterator[Metric]:
        if self._figures is None:
            return
        seen = self._figures()
        plain: tuple[tuple[str, str, float | None], ...] = (
            ("degraded", "1: an expert actor does not serve, or an expert is lost. /health says why", seen.degraded),
            ("rebalancing", "1: an operation that changes the placement is being carried out", seen.rebalancing),
            ("placement_held", "1: a training run holds the placement, so that nothing is planned", seen.held),
            ("lost_experts", "Experts that no actor serves, except cold ones", seen.lost_experts),
            ("cold_experts", "Experts without a replica on purpose", seen.cold_experts),
            ("replicas_aside", "Replicas set aside because they returned NaN or infinity", seen.replicas_aside),
            ("routers", "Routers whose lease has not expired", seen.routers),
            ("last_plan_age_seconds", "Time since the policy last looked at the load", seen.plan_age_s),
            ("last_load_age_seconds", "Age of the counters that the planner last read", seen.load_age_s),
        )
        for name, doc, value in plain:
            if value is not None:
                yield self._declare.family("gauge", name, doc, (), [((), float(value))])
        actors: list[Row] = [((state,), count) for state, count in seen.actors.items()]
        yield self._declare.family("gauge", "expert_actors", "Expert actors by state", ("state",), actors)
        ages: list[Row] = [((kind,), age_s) for kind, age_s in seen.operation_age_s.items()]
        yield self._declare.family(
            "gauge",
            "operation_age_seconds",
            "Age of the oldest operation of a kind that has not ended",
            ("kind",),
            ages,
        )
