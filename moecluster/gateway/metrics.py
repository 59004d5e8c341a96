"""The front's metrics, declared once, in a registry of its own. Names and units as Prometheus wants them.

All series carry the labels `model` and `cluster`, as those of the model's actors do. What no model can be told of (a
request with a wrong path, to a front of several models) has them empty.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moecluster.metrics import COMMON_LABELS, TOKEN_BUCKETS_S


class FrontMetrics:
    """All metrics of the front's process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._clusters: dict[str, str] = {}  # model -> its cluster
        self._requests = Counter(
            "moecluster_front_requests", "HTTP requests by route and status", (*COMMON_LABELS, "route", "status"),
            registry=self.registry,
        )  # fmt: skip
        self._in_flight = Gauge(
            "moecluster_front_requests_in_flight", "HTTP requests that are being answered, of all models",
            COMMON_LABELS, registry=self.registry,
        )  # fmt: skip
        self._first_token = Histogram(
            "moecluster_front_time_to_first_token_seconds", "From asking the routers for a text to its first token",
            COMMON_LABELS, registry=self.registry, buckets=TOKEN_BUCKETS_S,
        )  # fmt: skip
        self._inter_token = Histogram(
            "moecluster_front_inter_token_seconds", "From one token to the next", COMMON_LABELS,
            registry=self.registry, buckets=TOKEN_BUCKETS_S,
        )  # fmt: skip
        self._tokens = Counter(
            "moecluster_front_generated_tokens", "Tokens that routers wrote", COMMON_LABELS, registry=self.registry
        )
        self._failovers = Counter(
            "moecluster_front_failovers", "Texts that a router lost and that were taken to another", COMMON_LABELS,
            registry=self.registry,
        )  # fmt: skip
        self._routers = Gauge("moecluster_front_routers", "Routers that answer", COMMON_LABELS, registry=self.registry)

    def add_model(self, model: str, cluster: str) -> None:
        """A model that is served from now on, and the name of its cluster."""
        self._clusters[model] = cluster

    def render(self) -> bytes:
        """The text that /metrics shows."""
        return generate_latest(self.registry)

    def begin_request(self) -> None:
        """A request came."""
        self._in_flight.labels(*self._of("")).inc()

    def end_request(self, route: str, status: int, *, model: str = "") -> None:
        """A request was answered; status 499: its client went away before. model: that it was for, if it is served."""
        self._in_flight.labels(*self._of("")).dec()
        self._requests.labels(*self._of(model), route, status).inc()

    def observe_tokens(self, model: str, *, seconds: float, count: int, first: bool) -> None:
        """Tokens that came together, so many seconds after the last ones, or after the text was asked for."""
        (self._first_token if first else self._inter_token).labels(*self._of(model)).observe(seconds)
        for _ in range(count - 1):
            self._inter_token.labels(*self._of(model)).observe(0.0)
        self._tokens.labels(*self._of(model)).inc(count)

    def count_failover(self, model: str) -> None:
        """Adds a begun text whose router was lost."""
        self._failovers.labels(*self._of(model)).inc()

    def set_routers(self, model: str, answering: int) -> None:
        """How many routers answer."""
        self._routers.labels(*self._of(model)).set(answering)

    def _of(self, model: str) -> tuple[str, str]:
        """(model, cluster). What is of no model is of the only one, where there is only one."""
        if not model and len(self._clusters) == 1:
            model = next(iter(self._clusters))
        return model, self._clusters.get(model, "")
