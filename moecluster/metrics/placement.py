"""Metrics of the placement: which replica stands where, and with which share."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from heapq import nlargest

import numpy as np
import numpy.typing as npt
from prometheus_client.metrics_core import Metric

from moecluster.metrics.declare import Declarations, MetricGroup, Row
from moecluster.metrics.shown_experts import ShownExperts
from moecluster.types import Replica

Floats = npt.NDArray[np.float64]


class PlacementMetrics(MetricGroup):
    """Set by the controller."""

    def __init__(self, declare: Declarations) -> None:
        super().__init__(declare)
        self._generation = declare.gauge("placement_generation", "Generation of the current placement")
        self._placement_lock = threading.Lock()
        self._placed: _Placed | None = None
        self._loads: Mapping[int, Floats] = {}
        self._shown_experts = ShownExperts(declare.max_expert_series, declare.clock)
        declare.collect_from(self._placement_series)

    def set_generation(self, generation: int) -> None:
        """Sets the generation of the current placement."""
        self._generation.labels(*self._common).set(generation)

    def set_replicas(self, layer_experts: Mapping[int, int], replicas: Sequence[Replica]) -> None:
        """Sets the replicas of the placement. layer_experts: MoE layer -> its number of experts."""
        with self._placement_lock:
            self._placed = _Placed(dict(layer_experts), replicas)

    def set_expert_loads(self, loads: Mapping[int, Floats]) -> None:
        """Sets the load of every expert: by it the experts to show are chosen. loads: layer -> by expert, any unit."""
        with self._placement_lock:
            self._loads = loads

    def _placement_series(self) -> Iterator[Metric]:
        with self._placement_lock:
            placed, loads = self._placed, self._loads
        if placed is None:
            return
        every, on = placed.experts, placed.by_expert
        shown = self._shown_experts.of_loads(loads, every)
        counts: list[Row] = [((str(layer), str(e)), len(on.get((layer, e), ()))) for layer, e in shown]
        shares: list[Row] = [
            ((str(layer), str(e), replica.actor), replica.share)
            for layer, e in shown
            for replica in on.get((layer, e), ())
        ]
        if len(shown) < len(every):  # the hottest experts may have a replica on every actor
            shares = nlargest(self._declare.max_expert_series, shares, key=lambda row: row[1])
        yield self._declare.family(
            "gauge", "expert_replicas", "Replicas of an expert in the placement", ("layer", "expert"), counts
        )
        yield self._declare.family(
            "gauge",
            "replica_share",
            "Share of an expert's tokens that its replica on an actor takes",
            ("layer", "expert", "actor"),
            shares,
        )


class _Placed:
    """A placement, as it is shown. Its tables are made when they are first read: a placement may be changed sooner."""

    def __init__(self, layer_experts: Mapping[int, int], replicas: Sequence[Replica]) -> None:
        self._layer_experts, self._replicas = layer_experts, replicas

    @cached_property
    def experts(self) -> list[tuple[int, int]]:
        """All (layer, index)."""
        return [(layer, e) for layer, experts in sorted(self._layer_experts.items()) for e in range(experts)]

    @cached_property
    def by_expert(self) -> Mapping[tuple[int, int], Sequence[Replica]]:
        """(layer, index) -> its replicas."""
        on: dict[tuple[int, int], list[Replica]] = {}
        for replica in self._replicas:
            on.setdefault((replica.expert.layer, replica.expert.index), []).append(replica)
        return on
