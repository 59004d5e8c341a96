"""Metrics of generation requests, and of the attention cache that they fill."""

from collections.abc import Callable

from moecluster.metrics.buckets import REQUEST_BUCKETS_S, TOKEN_BUCKETS_S
from moecluster.metrics.declare import Declarations, MetricGroup, children


class RequestMetrics(MetricGroup):
    """Set by routers."""

    def __init__(self, declare: Declarations) -> None:
        super().__init__(declare)
        self._requests = declare.counter("requests", "Generation requests by final status", "status")
        self._request_seconds = declare.histogram(
            "request_seconds", "Time from a request's arrival to its end", REQUEST_BUCKETS_S, "status"
        )
        self._prompt_tokens = declare.counter(
            "prompt_tokens", "Tokens of prompts, by whether the cache held them", "cached"
        )
        self._generated_tokens = children(
            declare.counter("generated_tokens", "Tokens generated for requests"), declare.common
        )
        self._first_token = children(
            declare.histogram(
                "time_to_first_token_seconds", "Time from a request's arrival to its first token", TOKEN_BUCKETS_S
            ),
            declare.common,
        )
        self._inter_token = children(
            declare.histogram("inter_token_seconds", "Time between consecutive tokens of a request", TOKEN_BUCKETS_S),
            declare.common,
        )
        self._running_requests = declare.gauge("router_running_requests", "Requests that the router is generating")
        self._waiting_requests = declare.gauge("router_waiting_requests", "Requests waiting in the router")
        self._cache_tokens = declare.gauge(
            "attention_cache_tokens",
            "Tokens of the running requests, prompts included, which the attention cache holds",
        )
        self._max_cache_tokens = declare.gauge(
            "attention_cache_max_tokens", "Tokens that the attention cache has room for"
        )

    def count_request(self, status: str) -> None:
        """Adds a finished request. status: stop, length, cancelled, refused or failed."""
        self._requests.labels(*self._common, status).inc()

    def observe_request(self, status: str, *, seconds: float, prompt_tokens: int, cached_tokens: int) -> None:
        """Adds the duration and the prompt of a finished request that was not refused. cached_tokens: those of the
        prompt that needed no computing."""
        self._request_seconds.labels(*self._common, status).observe(seconds)
        self._prompt_tokens.labels(*self._common, "yes").inc(cached_tokens)
        self._prompt_tokens.labels(*self._common, "no").inc(prompt_tokens - cached_tokens)

    def observe_first_token(self, seconds: float) -> None:
        """Adds a request's first token. seconds: since the request's arrival."""
        self._generated_tokens().inc()
        self._first_token().observe(seconds)

    def observe_next_token(self, seconds: float) -> None:
        """Adds another token. seconds: since the token before."""
        self._generated_tokens().inc()
        self._inter_token().observe(seconds)

    def watch_requests(self, *, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Shows a router's running and waiting requests; both functions are called when /metrics is read."""
        self._running_requests.labels(*self._common).set_function(running)
        self._waiting_requests.labels(*self._common).set_function(waiting)

    def watch_attention_cache(self, *, used: Callable[[], int], room: Callable[[], int]) -> None:
        """Shows how full the attention cache is, in tokens; both functions are called when /metrics is read."""
        self._cache_tokens.labels(*self._common).set_function(used)
        self._max_cache_tokens.labels(*self._common).set_function(room)
