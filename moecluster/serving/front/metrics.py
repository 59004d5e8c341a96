"""The front's metrics, declared once, in a registry of its own. Names and units as Prometheus wants them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moecluster.metrics import TOKEN_BUCKETS_S


class FrontMetrics:
    """All metrics of the front's process. What is known of one model carries the label `model`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "moecluster_front_requests", "HTTP requests by route and status", ("route", "status"),
            registry=self.registry,
        )  # fmt: skip
        self._in_flight = Gauge(
            "moecluster_front_requests_in_flight", "HTTP requests that are being answered", registry=self.registry
        )
        self._first_token = Histogram(
            "moecluster_front_time_to_first_token_seconds", "From asking the routers for a text to its first token",
            ("model",), registry=self.registry, buckets=TOKEN_BUCKETS_S,
        )  # fmt: skip
        self._inter_token = Histogram(
            "moecluster_front_inter_token_seconds", "From one token to the next", ("model",),
            registry=self.registry, buckets=TOKEN_BUCKETS_S,
        )  # fmt: skip
        self._tokens = Counter(
            "moecluster_front_generated_tokens", "Tokens that routers wrote", ("model",), registry=self.registry
        )
        self._failovers = Counter(
            "moecluster_front_failovers", "Texts that a router lost and that were taken to another", ("model",),
            registry=self.registry,
        )  # fmt: skip
        self._routers = Gauge("moecluster_front_routers", "Routers that answer", ("model",), registry=self.registry)

    def render(self) -> bytes:
        """The text that /metrics shows."""
        return generate_latest(self.registry)

    def begin_request(self) -> None:
        """A request came."""
        self._in_flight.inc()

    def end_request(self, route: str, status: int) -> None:
        """A request was answered; status 499: its client went away before."""
        self._in_flight.dec()
        self._requests.labels(route, status).inc()

    def observe_tokens(self, model: str, *, seconds: float, count: int, first: bool) -> None:
        """Tokens that came together, so many seconds after the last ones, or after the text was asked for."""
        (self._first_token if first else self._inter_token).labels(model).observe(seconds)
        for _ in range(count - 1):
            self._inter_token.labels(model).observe(0.0)
        self._tokens.labels(model).inc(count)

    def count_failover(self, model: str) -> None:
        """Adds a begun text whose router was lost."""
        self._failovers.labels(model).inc()

    def set_routers(self, model: str, answering: int) -> None:
        """How many routers answer."""
        self._routers.labels(model).set(answering)
