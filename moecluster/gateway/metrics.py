"""The gateway's metrics, declared once, in a registry of its own. Names and units as Prometheus wants them.

All series carry the labels `model` and `cluster`, as those of the model's actors do. The labels are empty for a request
that belongs to no model (a wrong path, at a gateway of several models).
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moecluster.metrics.buckets import TOKEN_BUCKETS_S
from moecluster.metrics.declare import COMMON_LABELS


class GatewayMetrics:
    """All metrics of the gateway's process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._clusters: dict[str, str] = {}  # model -> its cluster
        self._requests = Counter(
            "moecluster_gateway_requests", "HTTP requests by route and HTTP status; 499: the client left first",
            (*COMMON_LABELS, "route", "code"), registry=self.registry,
        )  # fmt: skip
        self._in_flight = Gauge(
            "moecluster_gateway_requests_in_flight", "HTTP requests being answered, for all models together",
            COMMON_LABELS, registry=self.registry,
        )  # fmt: skip
        self._first_token = Histogram(
            "moecluster_gateway_time_to_first_token_seconds", "Time from a request's start to its first token",
            COMMON_LABELS, registry=self.registry, buckets=TOKEN_BUCKETS_S,
        )  # fmt: skip
        self._inter_token = Histogram(
            "moecluster_gateway_inter_token_seconds", "Time between consecutive tokens of a request", COMMON_LABELS,
            registry=self.registry, buckets=TOKEN_BUCKETS_S,
        )  # fmt: skip
        self._tokens = Counter(
            "moecluster_gateway_generated_tokens", "Tokens received from routers", COMMON_LABELS, registry=self.registry
        )
        self._failovers = Counter(
            "moecluster_gateway_failovers", "Requests continued at another router after theirs was lost", COMMON_LABELS,
            registry=self.registry,
        )  # fmt: skip
        self._routers = Gauge(
            "moecluster_gateway_routers", "Routers that respond", COMMON_LABELS, registry=self.registry
        )

    def add_model(self, model: str, cluster: str) -> None:
        """Adds a served model and the name of its cluster."""
        self._clusters[model] = cluster

    def render(self) -> bytes:
        """Returns the content of /metrics."""
        return generate_latest(self.registry)

    def begin_request(self) -> None:
        """Counts a request that has arrived."""
        self._in_flight.labels(*self._of("")).inc()

    def end_request(self, route: str, status: int, *, model: str = "") -> None:
        """Counts an answered request. status 499: its client disconnected before. model: the served model, if any."""
        self._in_flight.labels(*self._of("")).dec()
        self._requests.labels(*self._of(model), route, status).inc()

    def observe_tokens(self, model: str, *, seconds: float, count: int, first: bool) -> None:
        """Records tokens that arrived together, `seconds` after the previous ones, or after the start of the choice."""
        (self._first_token if first else self._inter_token).labels(*self._of(model)).observe(seconds)
        for _ in range(count - 1):
            self._inter_token.labels(*self._of(model)).observe(0.0)
        self._tokens.labels(*self._of(model)).inc(count)

    def count_failover(self, model: str) -> None:
        """Counts a choice that lost its router after its first token."""
        self._failovers.labels(*self._of(model)).inc()

    def set_routers(self, model: str, answering: int) -> None:
        """Sets how many routers answer."""
        self._routers.labels(*self._of(model)).set(answering)

    def _of(self, model: str) -> tuple[str, str]:
        """Returns (model, cluster). An empty model means the only one, if there is only one."""
        if not model and len(self._clusters) == 1:
            model = next(iter(self._clusters))
        return model, self._clusters.get(model, "")
