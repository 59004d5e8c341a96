"""Declares every metric once, in a separate registry. Names and units follow the Prometheus conventions.

Each process makes one `Metrics` and calls its small methods; a file per subject declares them. A series appears with
its first value, so a router shows no training loss and an expert actor no requests. All series of all processes carry
the labels `model`, the name under which the model is served, and `cluster`, the cluster's name, so that series of
different processes can be joined. A label has one meaning everywhere: `layer` and `expert` are those of the model,
`actor` is the name of an expert actor, `kind` an operation's.

`moecluster_start_time_seconds` exists from the start: it distinguishes the incarnations of a process, each of which
starts all counters at 0.
"""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, generate_latest

from moecluster.metrics.actors import ActorMetrics
from moecluster.metrics.declare import Declarations
from moecluster.metrics.dispatch import DispatchMetrics
from moecluster.metrics.experts import ExpertMetrics
from moecluster.metrics.operations import OperationMetrics
from moecluster.metrics.placement import PlacementMetrics
from moecluster.metrics.process import ProcessMetrics
from moecluster.metrics.requests import RequestMetrics
from moecluster.metrics.training import TrainingMetrics

MAX_EXPERT_SERIES = 1024


class Metrics(
    # From the last shown to the first.
    ProcessMetrics,
    TrainingMetrics,
    RequestMetrics,
    OperationMetrics,
    PlacementMetrics,
    DispatchMetrics,
    ActorMetrics,
    ExpertMetrics,
):
    """All metrics of one process.

    model: the name under which the model is served. cluster: the cluster's name. max_expert_series: most per-expert
    series of one metric; beyond it only the hottest and the coldest experts are shown. clock: seconds.
    """

    def __init__(
        self,
        *,
        model: str,
        cluster: str = "",
        max_expert_series: int = MAX_EXPERT_SERIES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(Declarations(model, cluster, max_expert_series=max_expert_series, clock=clock))
        self.model = model
        self.cluster = cluster

    @property
    def registry(self) -> CollectorRegistry:
        """What is exported."""
        return self._declare.registry

    def render(self) -> str:
        """The content of /metrics."""
        return generate_latest(self.registry).decode()
