"""Declares every metric once, in a separate registry. Names and units follow the Prometheus conventions.

Each process makes one `Metrics` and calls its small methods. A series appears with its first value, so a router shows
no training loss and an expert actor no requests. All series of all processes carry the labels `model`, the name under
which the model is served, and `cluster`, the cluster's name, so that series of different processes can be joined.

`moecluster_start_time_seconds` exists from the start: it distinguishes the incarnations of a process, each of which
starts all counters at 0.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moecluster.types import ExpertId

DISPATCH_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 20.0, 60.0)
TOKEN_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)
STEP_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
QUANTILE_LABEL = "q"  # `quantile` belongs to summaries, and promtool refuses it on a gauge
COMMON_LABELS = ("model", "cluster")
MAX_EXPERT_SERIES = 1024
ENTROPY_WINDOW_S = 10.0
MAX_NONFINITE_SERIES = 256


class Metrics:
    """All metrics of one process.

    model: the name under which the model is served. cluster: the cluster's name. max_expert_series: most per-expert
    series of one metric; beyond it only the highest ones are shown, beside quantiles over all experts of a layer.
    """

    def __init__(
        self,
        *,
        model: str,
        cluster: str = "",
        max_expert_series: int = MAX_EXPERT_SERIES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.cluster = cluster
        self._common = (model, cluster)
        self._clock = clock
        self.registry = CollectorRegistry()
        self._started = self._gauge("start_time_seconds", "Unix time at which the process started counting")
        self._started.labels(*self._common).set(time.time())
        self._expert_tokens = _ExpertSeries(
            "expert_tokens", "Assignments (token, expert) made by the gate", "counter", self._common, max_expert_series
        )
        self._expert_replicas = _ExpertSeries(
            "expert_replicas", "Replicas of an expert in the placement", "gauge", self._common, max_expert_series
        )
        self.registry.register(self._expert_tokens)
        self.registry.register(self._expert_replicas)

        self._layer_balancedness = self._gauge(
            "layer_balancedness",
            "Mean / maximum actor load, each divided by the actor's speed; 1 is perfect; absent without load",
            "layer",
        )
        self._balanced_layers: set[int] = set()
        self._router_entropy = self._gauge(
            "router_entropy",
            "Entropy in nats of a token's top-k routing weights, scaled to sum to 1 (at most ln k); mean over the last "
            f"{ENTROPY_WINDOW_S:.0f} to {2 * ENTROPY_WINDOW_S:.0f} s in which there were tokens; absent for top-1",
            "layer",
        )
        self._entropies: dict[int, _WindowMean] = {}
        self._entropy_lock = threading.Lock()
        self._dropped = self._counter(
            "dropped_assignments", "Assignments skipped because the expert was at capacity", "layer"
        )

        self._actor_tokens = self._counter("actor_tokens", "Pairs (row, expert) computed by an expert actor", "actor")
        self._actor_runs = self._counter(
            "actor_expert_runs", "Expert computations, one per expert and merged batch", "actor"
        )
        self._actor_queue_rows = self._gauge("actor_queue_rows", "Rows waiting in an expert actor's queue", "actor")
        self._actor_busy = self._counter("actor_busy_seconds", "Time an expert actor spent computing", "actor")
        self._actor_speed = self._gauge("actor_speed", "Relative speed that the planner assumes; 1 is typical", "actor")
        self._measured_actors: set[str] = set()

        self._dispatch = self._histogram(
            "dispatch_seconds",
            "From sending a message to an expert actor to its reply",
            DISPATCH_BUCKETS_S,
            "transport",
        )
        self._dispatch_bytes = self._counter(
            "dispatch_bytes", "Tensor bytes exchanged with expert actors", "transport", "direction"
        )
        self._lanes = _Lanes(self._common)
        self.registry.register(self._lanes)
        self._dispatch_retries = self._counter("dispatch_retries", "Messages to expert actors sent again", "reason")

        self._nonfinite = self._counter(
            "nonfinite_replies", "Replies of a replica with NaN or infinity", "layer", "expert", "actor"
        )
        self._nonfinite_seen: set[tuple[ExpertId, str]] = set()

        self._generation = self._gauge("placement_generation", "Generation of the current placement")
        self._operations = self._counter(
            "operations",
            "Operations (changes of placement or size) that reached a phase; each counts once per phase",
            "kind",
            "phase",
        )
        self._moved_bytes = self._counter(
            "moved_bytes", "Bytes of expert weights loaded by operations, failed ones included"
        )
        self._operation_seconds = self._histogram(
            "operation_seconds", "Duration of successful operations", STEP_BUCKETS_S, "kind"
        )

        self._requests = self._counter("requests", "Generation requests by final status", "status")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Time from a request's arrival to its first token", TOKEN_BUCKETS_S
        )
        self._inter_token = self._histogram(
            "inter_token_seconds", "Time between consecutive tokens of a request", TOKEN_BUCKETS_S
        )
        self._running_requests = self._gauge("router_running_requests", "Requests that the router is generating")
        self._waiting_requests = self._gauge("router_waiting_requests", "Requests waiting in the router")

        self._train_loss = self._gauge(
            "train_loss", "Cross-entropy of the last committed step in nats per token, without auxiliary losses"
        )
        self._train_aux_loss = self._gauge(
            "train_aux_loss",
            "Auxiliary loss of the last committed step, times its coefficient, over all layers; not part of train_loss",
            "kind",
        )
        self._aux_kinds: set[str] = set()
        self._train_step = self._histogram("train_step_seconds", "Duration of a committed step", STEP_BUCKETS_S)
        self._train_replays = self._counter("train_step_replays", "Attempts of training steps that were run again")

    def render(self) -> str:
        """The content of /metrics."""
        return generate_latest(self.registry).decode()

    # -- experts and layers --

    def count_assignments(self, layer: int, counts_E: Sequence[int] | np.ndarray) -> None:
        """Adds to the tokens routed to each expert of a layer; entry e belongs to expert e."""
        self._expert_tokens.add(layer, np.asarray(counts_E, dtype=np.float64))

    def count_dropped(self, layer: int, assignments: int) -> None:
        """Adds assignments that were skipped."""
        self._dropped.labels(*self._common, layer).inc(assignments)

    def set_replicas(self, replicas: Mapping[ExpertId, int]) -> None:
        """Sets how many replicas every expert of the placement has."""
        layers: dict[int, dict[int, int]] = {}
        for expert, count in replicas.items():
            layers.setdefault(expert.layer, {})[expert.index] = count
        for layer, counts in layers.items():
            values_E = np.zeros(max(counts) + 1)
            values_E[list(counts)] = list(counts.values())
            self._expert_replicas.set(layer, values_E)

    def set_layer_balancedness(self, layer: int, balancedness: float | None) -> None:
        """Sets a layer's balancedness; 1 is perfect. None removes the series: the layer has no load."""
        if balancedness is not None:
            self._layer_balancedness.labels(*self._common, layer).set(balancedness)
            self._balanced_layers.add(layer)
        elif layer in self._balanced_layers:
            self._layer_balancedness.remove(*self._common, layer)
            self._balanced_layers.discard(layer)

    def add_router_entropy(self, layer: int, *, total: float, tokens: int) -> None:
        """Adds tokens. total: the sum of the entropies of their routing weights, in nats. tokens: at least 1."""
        with self._entropy_lock:
            window = self._entropies.setdefault(layer, _WindowMean(ENTROPY_WINDOW_S, self._clock))
            mean = window.add(total, tokens)
        self._router_entropy.labels(*self._common, layer).set(mean)

    # -- expert actors --

    def count_computed(self, actor: str, *, pairs: int, runs: int, busy_s: float) -> None:
        """Adds a computed batch: its (row, expert) pairs, and the expert runs that they needed."""
        self._actor_tokens.labels(*self._common, actor).inc(pairs)
        self._actor_runs.labels(*self._common, actor).inc(runs)
        self._actor_busy.labels(*self._common, actor).inc(busy_s)

    def set_queue_rows(self, actor: str, rows: int) -> None:
        """Sets the rows that wait now."""
        self._actor_queue_rows.labels(*self._common, actor).set(rows)

    def set_actor_speeds(self, speeds: Mapping[str, float]) -> None:
        """Sets the speeds that the planner assumes, for all current actors; 1 is typical. Removes other actors'
        series."""
        for actor, speed in speeds.items():
            self._actor_speed.labels(*self._common, actor).set(speed)
        for gone in self._measured_actors - speeds.keys():
            self._actor_speed.remove(*self._common, gone)
        self._measured_actors = set(speeds)

    # -- dispatch --

    def count_dispatch(self, *, transport: str, seconds: float, sent_bytes: int, received_bytes: int) -> None:
        """Adds one message to an expert actor that got a reply."""
        self._dispatch.labels(*self._common, transport).observe(seconds)
        self._dispatch_bytes.labels(*self._common, transport, "sent").inc(sent_bytes)
        self._dispatch_bytes.labels(*self._common, transport, "received").inc(received_bytes)

    def count_retry(self, reason: str) -> None:
        """Adds a message that is sent again. reason: a short fixed word, for example not_hosted, unavailable."""
        self._dispatch_retries.labels(*self._common, reason).inc()

    def count_nonfinite_reply(self, expert: ExpertId, actor: str) -> None:
        """Adds a batch for which a replica returned NaN or infinity. Beyond MAX_NONFINITE_SERIES replicas the labels
        are "other"."""
        if len(self._nonfinite_seen) < MAX_NONFINITE_SERIES:
            self._nonfinite_seen.add((expert, actor))
        known = (expert, actor) in self._nonfinite_seen
        names = (str(expert.layer), str(expert.index), actor) if known else ("other", "other", "other")
        self._nonfinite.labels(*self._common, *names).inc()

    def watch_lanes(self, lanes: Callable[[], Mapping[str, tuple[str, bool]]]) -> None:
        """Shows, for each expert actor, the lane that rows take to it, and whether it is only for want of memory to
        share; called when /metrics is read."""
        self._lanes.watch(lanes)

    # -- placement --

    def set_generation(self, generation: int) -> None:
        """Sets the generation of the current placement."""
        self._generation.labels(*self._common).set(generation)

    def count_operation(self, kind: str, phase: str) -> None:
        """Adds an operation that reached a phase for the first time. kind and phase as in Operation and
        OperationPhase."""
        self._operations.labels(*self._common, kind, phase).inc()

    def observe_operation(self, kind: str, *, seconds: float) -> None:
        """Adds a successful operation."""
        self._operation_seconds.labels(*self._common, kind).observe(seconds)

    def count_moved_bytes(self, moved_bytes: int) -> None:
        """Adds bytes of expert weights loaded by an operation."""
        self._moved_bytes.labels(*self._common).inc(moved_bytes)

    # -- requests --

    def count_request(self, status: str) -> None:
        """Adds a finished request. status: stop, length, cancelled, refused or failed."""
        self._requests.labels(*self._common, status).inc()

    def observe_first_token(self, seconds: float) -> None:
        """Adds the time from a request's arrival to its first token."""
        self._first_token.labels(*self._common).observe(seconds)

    def observe_next_token(self, seconds: float) -> None:
        """Adds the time between two consecutive tokens."""
        self._inter_token.labels(*self._common).observe(seconds)

    def watch_requests(self, *, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Shows a router's running and waiting requests; both functions are called when /metrics is read."""
        self._running_requests.labels(*self._common).set_function(running)
        self._waiting_requests.labels(*self._common).set_function(waiting)

    # -- training --

    def observe_train_step(self, *, loss: float, aux_losses: Mapping[str, float], seconds: float) -> None:
        """Adds a committed step. loss: cross-entropy, nats per token. aux_losses: kind -> loss with its coefficient."""
        self._train_loss.labels(*self._common).set(loss)
        for kind in self._aux_kinds - aux_losses.keys():
            self._train_aux_loss.remove(*self._common, kind)
        for kind, value in aux_losses.items():
            self._train_aux_loss.labels(*self._common, kind).set(value)
        self._aux_kinds = set(aux_losses)
        self._train_step.labels(*self._common).observe(seconds)

    def count_replay(self) -> None:
        """Adds an attempt that repeats a training step."""
        self._train_replays.labels(*self._common).inc()

    # -- declaring --

    def _counter(self, name: str, doc: str, *labels: str) -> Counter:
        return Counter(f"moecluster_{name}", doc, (*COMMON_LABELS, *labels), registry=self.registry)

    def _gauge(self, name: str, doc: str, *labels: str) -> Gauge:
        return Gauge(f"moecluster_{name}", doc, (*COMMON_LABELS, *labels), registry=self.registry)

    def _histogram(self, name: str, doc: str, buckets_s: Sequence[float], *labels: str) -> Histogram:
        names = (*COMMON_LABELS, *labels)
        return Histogram(f"moecluster_{name}", doc, names, registry=self.registry, buckets=buckets_s)


class _ExpertSeries(Collector):
    """One value per logical expert; shows only the `limit` highest."""

    def __init__(
        self, name: str, doc: str, kind: Literal["counter", "gauge"], common: tuple[str, str], limit: int
    ) -> None:
        self._name, self._doc, self._kind = f"moecluster_{name}", doc, kind
        self._common, self._limit = common, limit
        self._layers: dict[int, np.ndarray] = {}  # layer -> float64 [E]
        self._lock = threading.Lock()

    def add(self, layer: int, values_E: np.ndarray) -> None:
        with self._lock:
            self._layers[layer] = self._layers.get(layer, 0.0) + values_E

    def set(self, layer: int, values_E: np.ndarray) -> None:
        with self._lock:
            self._layers[layer] = values_E

    def describe(self) -> list[Metric]:
        """Returns nothing, so that the registry does not collect to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            layers = dict(self._layers)
        family = (CounterMetricFamily if self._kind == "counter" else GaugeMetricFamily)(
            self._name, self._doc, labels=(*COMMON_LABELS, "layer", "expert")
        )
        values = [(layer, e, value) for layer, values_E in layers.items() for e, value in enumerate(values_E)]
        total = len(values)
        if total > self._limit:
            values = sorted(values, key=lambda entry: -entry[2])[: self._limit]
        for layer, expert, value in values:
            family.add_metric((*self._common, str(layer), str(expert)), float(value))
        yield family
        if total > self._limit:
            quantiles = GaugeMetricFamily(
                f"{self._name}_quantile", f"{self._doc}: quantiles over the experts of a layer",
                labels=(*COMMON_LABELS, "layer", QUANTILE_LABEL),
            )  # fmt: skip
            for layer, values_E in layers.items():
                for quantile, value in zip(QUANTILES, np.quantile(values_E, QUANTILES), strict=True):
                    quantiles.add_metric((*self._common, str(layer), str(quantile)), float(value))
            yield quantiles


class _Lanes(Collector):
    """The lane to each expert actor."""

    def __init__(self, common: tuple[str, str]) -> None:
        self._common = common
        self._lanes: Callable[[], Mapping[str, tuple[str, bool]]] = dict

    def watch(self, lanes: Callable[[], Mapping[str, tuple[str, bool]]]) -> None:
        self._lanes = lanes

    def describe(self) -> list[Metric]:
        """Returns nothing, as _ExpertSeries does."""
        return []

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "moecluster_transport",
            "1 for the lane that rows take to an expert actor; its shortage is memory if a better one lacks it",
            labels=(*COMMON_LABELS, "actor", "lane", "shortage"),
        )
        for actor, (lane, short) in sorted(self._lanes().items()):
            family.add_metric((*self._common, actor, lane, "memory" if short else ""), 1.0)
        yield family


class _WindowMean:
    """Mean over the last full window and the current one; idle time between values does not clear it."""

    def __init__(self, window_s: float, clock: Callable[[], float]) -> None:
        self._window_s, self._clock = window_s, clock
        self._began_s = clock()
        self._before = (0.0, 0)  # sum, count
        self._now = (0.0, 0)

    def add(self, total: float, count: int) -> float:
        """Adds values and returns the mean. count: at least 1."""
        now_s = self._clock()
        if now_s - self._began_s >= self._window_s:
            self._before, self._now, self._began_s = self._now, (0.0, 0), now_s
        self._now = (self._now[0] + total, self._now[1] + count)
        return (self._before[0] + self._now[0]) / (self._before[1] + self._now[1])
