"""One model behind the gateway: its name, its cluster's routers, and its generation metrics."""

import time
from collections.abc import AsyncGenerator, Callable, Sequence

from moecluster.config.sections import ServeConfig
from moecluster.gateway.api_errors import model_not_found
from moecluster.gateway.failover import FailoverStream
from moecluster.gateway.metrics import GatewayMetrics
from moecluster.gateway.router_discovery import ClusterAddresses, RouterDiscovery
from moecluster.generation import GenerationChunk, GenerationRequest
from moecluster.rpc.router.failover import Patience

MAX_FAILURES = 3  # of routers that are there and cannot write the text, without a token between them


class ServedModel:
    """A model name and the cluster that serves it. Belongs to the event loop that creates it."""

    def __init__(
        self,
        name: str,
        seeds: ClusterAddresses,
        settings: ServeConfig,
        metrics: GatewayMetrics,
        *,
        cluster: str = "",
        alias: str = "",
        rediscover: Callable[[], ClusterAddresses] | None = None,
    ) -> None:
        """cluster: the cluster's name, for metrics and tokens. alias: a second name, valid if there is no other."""
        metrics.add_model(name, cluster)
        self.name = name
        self.alias = alias
        self.cluster = cluster
        self.created = int(time.time())
        self.discovery = RouterDiscovery(
            seeds, rediscover=rediscover, on_poll=lambda answering: metrics.set_routers(name, answering)
        )
        self._metrics = metrics
        self._patience = Patience(
            request_timeout_s=settings.request_timeout_s,
            router_wait_timeout_s=settings.router_wait_timeout_s,
            max_failures=MAX_FAILURES,
            awaits_lost=False,
        )

    def generate(
        self, request: GenerationRequest, *, begun: Callable[[], bool] = lambda: False
    ) -> AsyncGenerator[GenerationChunk]:
        """Yields FailoverStream.chunks, and measures them."""
        stream = FailoverStream(
            request,
            self.discovery,
            self._patience,
            begun=begun,
            on_failover=lambda: self._metrics.count_failover(self.name),
            on_tokens=_TokenTimes(self._metrics, self.name).take,
        )
        return stream.chunks()


class _TokenTimes:
    """Measures the time between the tokens of one text, which starts now."""

    def __init__(self, metrics: GatewayMetrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._last_s = time.monotonic()
        self._first = True

    def take(self, count: int) -> None:
        """So many tokens came."""
        now_s = time.monotonic()
        self._metrics.observe_tokens(self._model, seconds=now_s - self._last_s, count=count, first=self._first)
        self._last_s, self._first = now_s, False


def find_model(models: Sequence[ServedModel], name: str) -> ServedModel:
    """Returns the model of a name. Raises ApiError 404."""
    for model in models:
        if name == model.name or (len(models) == 1 and name == model.alias):
            return model
    raise model_not_found(name)
