"""Every metric, declared once, in a registry of its own. Names and units as Prometheus wants them.

Each process makes one `Metrics` and calls its small methods; a series appears when its first value does, so a router
shows no training loss and an expert actor no requests. All series carry the label `model`.

`moecluster_start_time_seconds` is there from the start: it tells one life of a process from the next, where all
counters begin at 0.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moecluster.errors import ResourceError
from moecluster.types import ExpertId

DISPATCH_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 20.0, 60.0)
TOKEN_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)
STEP_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
MAX_EXPERT_SERIES = 1024


class _Server(Protocol):
    """What is used of the HTTP server that prometheus_client starts."""

    server_port: int

    def shutdown(self) -> None: ...

    def server_close(self) -> None: ...


class Metrics:
    """All metrics of one process.

    model: value of the label `model`. max_expert_series: per-expert series of one metric; beyond it only the highest
    ones are shown, beside quantiles over all experts of a layer.
    """

    def __init__(self, *, model: str, max_expert_series: int = MAX_EXPERT_SERIES) -> None:
        self.model = model
        self.registry = CollectorRegistry()
        self._server: _Server | None = None
        self._started = self._gauge("start_time_seconds", "Unix time at which the process began to count")
        self._started.labels(model).set(time.time())
        self._expert_tokens = _ExpertSeries(
            "expert_tokens", "Top-k assignments (token, expert) routed", "counter", model, max_expert_series
        )
        self._expert_replicas = _ExpertSeries(
            "expert_replicas", "Replicas that serve an expert", "gauge", model, max_expert_series
        )
        self.registry.register(self._expert_tokens)
        self.registry.register(self._expert_replicas)

        self._layer_balancedness = self._gauge("layer_balancedness", "Mean actor load / max actor load", "layer")
        self._router_entropy = self._gauge("router_entropy", "Mean entropy of the gate's probabilities, nats", "layer")
        self._dropped = self._counter("dropped_assignments", "Assignments skipped for want of capacity", "layer")

        self._actor_tokens = self._counter("actor_tokens", "(row, expert) pairs computed by an actor", "actor")
        self._actor_runs = self._counter("actor_expert_runs", "Times that an actor computed an expert", "actor")
        self._actor_queue_rows = self._gauge("actor_queue_rows", "Rows that wait in an actor", "actor")
        self._actor_busy = self._counter("actor_busy_seconds", "Time that an actor spent computing", "actor")
        self._actor_speed = self._gauge("actor_speed", "Speed that is planned with; 1 is usual", "actor")
        self._measured_actors: set[str] = set()

        self._dispatch = self._histogram(
            "dispatch_seconds", "From sending rows to an actor to its answer", DISPATCH_BUCKETS_S, "transport"
        )
        self._dispatch_bytes = self._counter(
            "dispatch_bytes", "Tensor bytes exchanged with expert actors", "transport", "direction"
        )
        self._dispatch_retries = self._counter("dispatch_retries", "Messages sent again", "reason")

        self._generation = self._gauge("placement_generation", "Generation of the placement in use")
        self._operations = self._counter("operations", "Changes of placement or size", "kind", "phase")
        self._moved_bytes = self._counter("moved_bytes", "Bytes of experts loaded by such changes")
        self._operation_seconds = self._histogram(
            "operation_seconds", "Duration of such changes", STEP_BUCKETS_S, "kind"
        )

        self._requests = self._counter("requests", "Generations by how they ended", "status")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token", TOKEN_BUCKETS_S
        )
        self._inter_token = self._histogram("inter_token_seconds", "From one token to the next", TOKEN_BUCKETS_S)
        self._running_texts = self._gauge("router_running_texts", "Texts that a router is writing")
        self._waiting_texts = self._gauge("router_waiting_texts", "Texts that wait in a router to be begun")

        self._train_loss = self._gauge("train_loss", "Loss of the last committed step, nats per token")
        self._train_step = self._histogram("train_step_seconds", "Duration of a committed step", STEP_BUCKETS_S)
        self._train_replays = self._counter("train_step_replays", "Attempts of steps that were run again")

    def serve(self, *, host: str, port: int) -> int:
        """Serves /metrics until `close`. port 0: any free one. Returns the port; ResourceError if it is in use."""
        assert self._server is None, "served already"
        try:
            server, _ = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise ResourceError(
                f"metrics: cannot listen on {host}:{port} ({error.strerror}); choose a free cluster.metrics_port, "
                "or 0 for any"
            ) from error
        self._server = server
        return server.server_port

    def close(self) -> None:
        """Ends serving. Repeated is fine."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def render(self) -> str:
        """The text that /metrics shows."""
        return generate_latest(self.registry).decode()

    # -- experts and layers --

    def count_assignments(self, layer: int, counts_E: Sequence[int] | np.ndarray) -> None:
        """Adds to the tokens routed to each expert of a layer; entry e belongs to expert e."""
        self._expert_tokens.add(layer, np.asarray(counts_E, dtype=np.float64))

    def count_dropped(self, layer: int, assignments: int) -> None:
        """Adds assignments that were skipped."""
        self._dropped.labels(self.model, layer).inc(assignments)

    def set_replicas(self, replicas: Mapping[ExpertId, int]) -> None:
        """Sets how many replicas every expert of the placement has."""
        layers: dict[int, dict[int, int]] = {}
        for expert, count in replicas.items():
            layers.setdefault(expert.layer, {})[expert.index] = count
        for layer, counts in layers.items():
            values_E = np.zeros(max(counts) + 1)
            values_E[list(counts)] = list(counts.values())
            self._expert_replicas.set(layer, values_E)

    def set_layer_balancedness(self, layer: int, balancedness: float) -> None:
        """1 is perfect."""
        self._layer_balancedness.labels(self.model, layer).set(balancedness)

    def set_router_entropy(self, layer: int, entropy: float) -> None:
        """In nats, mean over the tokens."""
        self._router_entropy.labels(self.model, layer).set(entropy)

    # -- expert actors --

    def count_computed(self, actor: str, *, pairs: int, runs: int, busy_s: float) -> None:
        """Adds a computed batch: (row, expert) pairs, and experts that were computed for them."""
        self._actor_tokens.labels(self.model, actor).inc(pairs)
        self._actor_runs.labels(self.model, actor).inc(runs)
        self._actor_busy.labels(self.model, actor).inc(busy_s)

    def set_queue_rows(self, actor: str, rows: int) -> None:
        """Rows that wait right now."""
        self._actor_queue_rows.labels(self.model, actor).set(rows)

    def set_actor_speeds(self, speeds: Mapping[str, float]) -> None:
        """What the planner counts on, of every actor that is there; 1 is the usual speed."""
        for actor, speed in speeds.items():
            self._actor_speed.labels(self.model, actor).set(speed)
        for gone in self._measured_actors - speeds.keys():
            self._actor_speed.remove(self.model, gone)
        self._measured_actors = set(speeds)

    # -- dispatch --

    def count_dispatch(self, *, transport: str, seconds: float, sent_bytes: int, received_bytes: int) -> None:
        """Adds one answered message to an expert actor."""
        self._dispatch.labels(self.model, transport).observe(seconds)
        self._dispatch_bytes.labels(self.model, transport, "sent").inc(sent_bytes)
        self._dispatch_bytes.labels(self.model, transport, "received").inc(received_bytes)

    def count_retry(self, reason: str) -> None:
        """Adds a message that is sent again. reason: a short fixed word, for example not_hosted, unavailable."""
        self._dispatch_retries.labels(self.model, reason).inc()

    # -- placement --

    def set_generation(self, generation: int) -> None:
        """Generation of the placement in use."""
        self._generation.labels(self.model).set(generation)

    def count_operation(self, kind: str, phase: str) -> None:
        """Adds an operation that reached a phase; the words are those of Operation and OperationPhase."""
        self._operations.labels(self.model, kind, phase).inc()

    def observe_operation(self, kind: str, *, seconds: float, moved_bytes: int) -> None:
        """Adds an operation that ended well."""
        self._operation_seconds.labels(self.model, kind).observe(seconds)
        self._moved_bytes.labels(self.model).inc(moved_bytes)

    # -- requests --

    def count_request(self, status: str) -> None:
        """Adds a generation that ended. status: stop, length, cancelled, refused or failed."""
        self._requests.labels(self.model, status).inc()

    def observe_first_token(self, seconds: float) -> None:
        """From the request to its first token."""
        self._first_token.labels(self.model).observe(seconds)

    def observe_next_token(self, seconds: float) -> None:
        """From one token to the next."""
        self._inter_token.labels(self.model).observe(seconds)

    def watch_texts(self, *, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Shows how many texts a router writes, and how many wait there; both are asked when /metrics is read."""
        self._running_texts.labels(self.model).set_function(running)
        self._waiting_texts.labels(self.model).set_function(waiting)

    # -- training --

    def observe_train_step(self, *, loss: float, seconds: float) -> None:
        """Adds a committed step; loss in nats per token."""
        self._train_loss.labels(self.model).set(loss)
        self._train_step.labels(self.model).observe(seconds)

    def count_replay(self) -> None:
        """Adds an attempt of a step that is run again."""
        self._train_replays.labels(self.model).inc()

    # -- declaring --

    def _counter(self, name: str, doc: str, *labels: str) -> Counter:
        return Counter(f"moecluster_{name}", doc, ("model", *labels), registry=self.registry)

    def _gauge(self, name: str, doc: str, *labels: str) -> Gauge:
        return Gauge(f"moecluster_{name}", doc, ("model", *labels), registry=self.registry)

    def _histogram(self, name: str, doc: str, buckets_s: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"moecluster_{name}", doc, ("model", *labels), registry=self.registry, buckets=buckets_s)


class _ExpertSeries(Collector):
    """One value per logical expert, of which at most `limit` are shown, the highest."""

    def __init__(self, name: str, doc: str, kind: Literal["counter", "gauge"], model: str, limit: int) -> None:
        self._name, self._doc, self._kind = f"moecluster_{name}", doc, kind
        self._model, self._limit = model, limit
        self._layers: dict[int, np.ndarray] = {}  # layer -> float64 [E]
        self._lock = threading.Lock()

    def add(self, layer: int, values_E: np.ndarray) -> None:
        with self._lock:
            self._layers[layer] = self._layers.get(layer, 0.0) + values_E

    def set(self, layer: int, values_E: np.ndarray) -> None:
        with self._lock:
            self._layers[layer] = values_E

    def describe(self) -> list[Metric]:
        """Nothing: the registry must not collect in order to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            layers = dict(self._layers)
        family = (CounterMetricFamily if self._kind == "counter" else GaugeMetricFamily)(
            self._name, self._doc, labels=("model", "layer", "expert")
        )
        values = [(layer, e, value) for layer, values_E in layers.items() for e, value in enumerate(values_E)]
        total = len(values)
        if total > self._limit:
            values = sorted(values, key=lambda entry: -entry[2])[: self._limit]
        for layer, expert, value in values:
            family.add_metric((self._model, str(layer), str(expert)), float(value))
        yield family
        if total > self._limit:
            quantiles = GaugeMetricFamily(
                f"{self._name}_quantile", f"{self._doc}: quantiles over the experts of a layer",
                labels=("model", "layer", "quantile"),
            )  # fmt: skip
            for layer, values_E in layers.items():
                for quantile, value in zip(QUANTILES, np.quantile(values_E, QUANTILES), strict=True):
                    quantiles.add_metric((self._model, str(layer), str(quantile)), float(value))
            yield quantiles
