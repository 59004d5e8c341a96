"""One model behind the front: its name, its cluster's routers, and its texts, measured."""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from moecluster.config.sections import ServeConfig
from moecluster.gateway.api_errors import model_not_found
from moecluster.gateway.failover import ContinuedText, Patience
from moecluster.gateway.metrics import FrontMetrics
from moecluster.gateway.router_discovery import RouterDirectory, Whereabouts
from moecluster.generation import GenerationPiece, GenerationRequest


class ServedModel:
    """A name and the cluster that stands behind it. Belongs to the event loop that makes it."""

    def __init__(
        self,
        name: str,
        seeds: Whereabouts,
        settings: ServeConfig,
        metrics: FrontMetrics,
        *,
        cluster: str = "",
        alias: str = "",
        rediscover: Callable[[], Whereabouts] | None = None,
    ) -> None:
        """cluster: the cluster's name, for the metrics. alias: a second name, that goes where the model is the only
        one."""
        metrics.add_model(name, cluster)
        self.name = name
        self.alias = alias
        self.created = int(time.time())
        self.directory = RouterDirectory(
            seeds, rediscover=rediscover, on_look=lambda answering: metrics.set_routers(name, answering)
        )
        self._metrics = metrics
        self._patience = Patience(
            request_timeout_s=settings.request_timeout_s, router_patience_s=settings.router_patience_s
        )

    async def write(
        self, request: GenerationRequest, *, begun: Callable[[], bool] = lambda: False
    ) -> AsyncGenerator[GenerationPiece]:
        """As ContinuedText.pieces."""
        text = ContinuedText(
            request,
            self.directory,
            self._patience,
            begun=begun,
            on_failover=lambda: self._metrics.count_failover(self.name),
        )
        last_s, first = time.monotonic(), True
        async with aclosing(text.pieces()) as pieces:
            async for piece in pieces:
                if piece.ids:
                    now_s = time.monotonic()
                    self._metrics.observe_tokens(self.name, seconds=now_s - last_s, count=len(piece.ids), first=first)
                    last_s, first = now_s, False
                yield piece


def find_model(models: Sequence[ServedModel], name: str) -> ServedModel:
    """The model of a name. Raises the Refusal 404."""
    for model in models:
        if name == model.name or (len(models) == 1 and name == model.alias):
            return model
    raise model_not_found(name)
