"""Metrics of logical experts and MoE layers, bounded: a large model has more experts than a process may have series.

A process with more experts than max_expert_series shows only the hottest and the coldest, the same ones in all its
per-expert metrics, and quantiles over the experts of each layer. Only `replica_tokens`, which each expert actor shows
for the few replicas that it holds, is complete in a large cluster: a sum over the actors gives every expert's load.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from prometheus_client.metrics_core import Metric

from moecluster.metrics.declare import Declarations, Kind, LayerGauge, MetricGroup, Row, children
from moecluster.metrics.shown_experts import ShownExperts
from moecluster.metrics.windows import WindowStats

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
QUANTILE_LABEL = "q"  # `quantile` belongs to summaries, and promtool refuses it on a gauge
ENTROPY_WINDOW_S = 10.0
OVERLOAD_WINDOW_S = 1800.0

Floats = npt.NDArray[np.float64]


class ExpertMetrics(MetricGroup):
    """Set by routers (what the gates choose), expert actors (what their replicas compute) and the controller (the
    layers' balance)."""

    def __init__(self, declare: Declarations) -> None:
        super().__init__(declare)
        self._expert_tokens = _Counts()
        self._recent_tokens = ShownExperts(declare.max_expert_series, declare.clock)
        self._replica_tokens = _Counts()
        self._recent_replicas = ShownExperts(declare.max_expert_series, declare.clock)
        self._hosted: tuple[str, Callable[[], Mapping[int, Collection[int]]]] | None = None
        declare.collect_from(self._expert_series)
        declare.collect_from(self._replica_series)

        self._layer_balancedness = LayerGauge(
            declare,
            "layer_balancedness",
            "Mean / maximum actor load, each divided by the actor's speed; 1 is perfect; absent without load",
        )
        self._load_entropy = LayerGauge(
            declare,
            "load_entropy",
            "Entropy of the experts' loads, divided by its maximum; 1 is even; absent without load",
        )
        self._overload = LayerGauge(
            declare,
            "overload_factor",
            "Load of a layer's hottest expert / mean load of its experts: now, and the mean and the worst of the last "
            f"{OVERLOAD_WINDOW_S / 60:.0f} to {2 * OVERLOAD_WINDOW_S / 60:.0f} minutes; absent without load",
            "stat",
        )
        self._overloads: dict[int, WindowStats] = {}
        self._dead_experts = LayerGauge(
            declare,
            "dead_experts",
            "Experts that no token was routed to for a load window (controller.window_s); absent without load",
        )
        self._router_entropy = children(
            declare.gauge(
                "router_entropy",
                "Entropy in nats of a token's top-k routing weights, scaled to sum to 1 (at most ln k); mean over the "
                f"last {ENTROPY_WINDOW_S:.0f} to {2 * ENTROPY_WINDOW_S:.0f} s in which there were tokens; absent for "
                "top-1",
                "layer",
            ),
            declare.common,
        )
        self._entropies: dict[int, WindowStats] = {}
        self._dropped = declare.counter(
            "dropped_assignments", "Assignments skipped because the expert was at capacity", "layer"
        )

    # -- routers --

    def count_assignments(self, layer: int, counts_E: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Adds to the tokens routed to each expert of a layer; entry e belongs to expert e."""
        self._expert_tokens.add(layer, np.asarray(counts_E, dtype=np.int64))

    def count_dropped(self, layer: int, assignments: int) -> None:
        """Adds assignments that were skipped."""
        self._dropped.labels(*self._common, layer).inc(assignments)

    def add_router_entropy(self, layer: int, *, total: float, tokens: int) -> None:
        """Adds tokens. total: the sum of the entropies of their routing weights, in nats. tokens: at least 1."""
        window = self._entropies.setdefault(layer, WindowStats(ENTROPY_WINDOW_S, self._declare.clock))
        window.add(total, tokens)
        self._router_entropy(layer).set(window.mean)

    # -- expert actors --

    def count_replica_tokens(self, layer: int, experts: Sequence[int], tokens: Sequence[int]) -> None:
        """Adds to the tokens computed by replicas of a layer's experts. experts: distinct indices. tokens: of each."""
        self._replica_tokens.add_at(layer, experts, tokens)

    def watch_replicas(self, actor: str, hosted: Callable[[], Mapping[int, Collection[int]]]) -> None:
        """Shows the tokens of the replicas that an actor holds. hosted: returns layer -> indices; it is called when
        /metrics is read."""
        self._hosted = (actor, hosted)

    # -- the controller --

    def set_layer_balancedness(self, layer: int, balancedness: float | None) -> None:
        """Sets a layer's balancedness; 1 is perfect. None removes the series: the layer has no load."""
        self._layer_balancedness.set(layer, balancedness)

    def set_layer_skew(self, layer: int, *, entropy: float | None, overload: float | None, dead: int | None) -> None:
        """Sets how unevenly a layer's experts are loaded. entropy: 1 is even. overload: maximum / mean load. dead:
        experts without a token. None removes the series: the layer has no load."""
        self._load_entropy.set(layer, entropy)
        self._dead_experts.set(layer, dead)
        window = self._overloads.setdefault(layer, WindowStats(OVERLOAD_WINDOW_S, self._declare.clock))
        if overload is not None:
            window.add(overload)
        self._overload.set(layer, overload, "now")
        self._overload.set(layer, None if overload is None else window.mean, "mean")
        self._overload.set(layer, None if overload is None else window.highest, "worst")

    # -- internal --

    def _expert_series(self) -> Iterator[Metric]:
        counts = self._expert_tokens.copy()
        if not counts:
            return
        doc = "Assignments (token, expert) made by the gate"
        every = _every_expert(tuple((layer, len(tokens_E)) for layer, tokens_E in counts.items()))
        shown = self._recent_tokens.of_counters(counts, every)
        yield self._family("counter", "expert_tokens", doc, ("layer", "expert"), _rows(counts, shown))
        if len(shown) < len(every):
            yield self._family(
                "gauge",
                "expert_tokens_quantile",
                f"{doc}: quantiles over the experts of a layer, where not all experts are shown",
                ("layer", QUANTILE_LABEL),
                _quantile_rows(counts),
            )

    def _replica_series(self) -> Iterator[Metric]:
        if self._hosted is None:
            return
        actor, hosted = self._hosted
        every = [(layer, e) for layer, experts in sorted(hosted().items()) for e in sorted(experts)]
        counts = self._replica_tokens.covering(every)
        shown = self._recent_replicas.of_counters(counts, every)
        rows = [((*labels, actor), value) for labels, value in _rows(counts, shown)]
        yield self._family(
            "counter",
            "replica_tokens",
            "Tokens computed forward by the replica of an expert that an actor holds now",
            ("layer", "expert", "actor"),
            rows,
        )
        yield self._family(
            "gauge",
            "hidden_replicas",
            "Replicas of an actor beyond cluster.max_expert_series, which replica_tokens does not show",
            ("actor",),
            [((actor,), len(every) - len(shown))],
        )

    def _family(self, kind: Kind, name: str, doc: str, labels: Sequence[str], rows: Iterable[Row]) -> Metric:
        return self._declare.family(kind, name, doc, labels, rows)


class _Counts:
    """Layer -> counts by expert, which only grow. Thread-safe."""

    def __init__(self) -> None:
        self._layers: dict[int, npt.NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    def add(self, layer: int, counts_E: npt.NDArray[np.int64]) -> None:
        with self._lock:
            self._with_room(layer, len(counts_E))[: len(counts_E)] += counts_E

    def add_at(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        with self._lock:
            self._with_room(layer, max(experts) + 1)[list(experts)] += np.asarray(counts, dtype=np.int64)

    def copy(self) -> dict[int, npt.NDArray[np.int64]]:
        with self._lock:
            return {layer: counts_E.copy() for layer, counts_E in sorted(self._layers.items())}

    def covering(self, experts: Iterable[tuple[int, int]]) -> dict[int, npt.NDArray[np.int64]]:
        """Returns a copy with an entry for each of these (layer, index)."""
        with self._lock:
            for layer, index in experts:
                self._with_room(layer, index + 1)
        return self.copy()

    def _with_room(self, layer: int, experts: int) -> npt.NDArray[np.int64]:
        counts_E = self._layers.get(layer, np.zeros(0, dtype=np.int64))
        if len(counts_E) < experts or layer not in self._layers:
            counts_E = self._layers[layer] = np.pad(counts_E, (0, max(experts - len(counts_E), 0)))
        return counts_E


@lru_cache(maxsize=8)
def _every_expert(layers: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """layers: each with its number of experts."""
    return tuple((layer, e) for layer, experts in layers for e in range(experts))


def _rows(counts: Mapping[int, npt.NDArray[np.int64]], shown: Iterable[tuple[int, int]]) -> list[Row]:
    return [((str(layer), str(e)), float(counts[layer][e])) for layer, e in shown]


def _quantile_rows(counts: Mapping[int, npt.NDArray[np.int64]]) -> Iterator[Row]:
    for layer, counts_E in counts.items():
        last = len(counts_E) - 1
        sorted_E = np.sort(counts_E)  # np.quantile takes longer than all else on the page
        for quantile in QUANTILES:
            below, part = divmod(quantile * last, 1.0)
            low, high = sorted_E[int(below)], sorted_E[min(int(below) + 1, last)]
            yield (str(layer), str(quantile)), float(low + part * (high - low))
