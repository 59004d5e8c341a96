"""One text, whatever becomes of the routers that write it: what one of them loses, another goes on with."""

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from moecluster.errors import (
    BatchBroken,
    ClusterEnded,
    DeadlineExceeded,
    Exhausted,
    ExpertsLost,
    InvalidMessage,
    MoeClusterError,
    RequestFailed,
    StaleRequest,
    Unavailable,
    UserError,
)
from moecluster.gateway.router_connection import RouterConnection
from moecluster.gateway.router_discovery import RouterDiscovery
from moecluster.generation import GenerationChunk, GenerationRequest
from moecluster.rpc.router.resume import MAX_BROKEN_BATCHES, ResumableRequest

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # of routers that are there and cannot write the text, without a token between them
POLL_AGAIN_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Patience:
    """For how long a text is taken from router to router."""

    request_timeout_s: float  # from its beginning to its end
    router_patience_s: float  # without a router that writes


class FailoverStream:
    """A text that is written once, from its first to its last token."""

    def __init__(
        self,
        request: GenerationRequest,
        directory: RouterDiscovery,
        patience: Patience,
        *,
        begun: Callable[[], bool] = lambda: False,
        on_failover: Callable[[], None] = lambda: None,
    ) -> None:
        """begun: whether its client was already told something, so that it waits where it would be refused."""
        self._text = ResumableRequest(request)
        self._directory = directory
        self._patience = patience
        self._client_begun = begun
        self._on_failover = on_failover
        self._failures = 0
        self._broken_batches = 0
        now_s = time.monotonic()
        self._deadline_s = now_s + patience.request_timeout_s
        self._progress_s = now_s

    async def chunks(self) -> AsyncGenerator[GenerationChunk]:
        """Every token once; the last chunk has a finish_reason, stop or length.

        Raises InvalidMessage or another UserError for a wrong request, RequestFailed for one that cannot be computed,
        Exhausted when all routers refuse a text that is not begun, DeadlineExceeded, BatchBroken when one batch after
        the other broke that it was in, ExpertsLost where what it needs cannot be loaded, and Unavailable when no router
        was found in time: ClusterEnded as soon as none can be.
        """
        while True:
            refused: list[Exhausted] = []
            holds_not = False  # a router is there, without the weights that the text was begun with
            for router in self._directory.candidates():
                try:
                    async with aclosing(router.generate(self._text.next_request(), self._left_s())) as chunks:
                        async for chunk in chunks:
                            _refuse_cancelled(chunk)
                            self._note(chunk)
                            yield chunk
                            if chunk.finish_reason:
                                return
                    raise Unavailable(f"router at {router.address}: the stream broke off")
                except Exhausted as exc:
                    refused.append(exc)
                except (InvalidMessage, UserError, RequestFailed, ExpertsLost):
                    raise
                except StaleRequest as exc:
                    if self._text.weight_version:
                        holds_not = True
                    else:
                        self._lost(router, exc)
                except MoeClusterError as exc:
                    self._lost(router, exc)
                if self._text.grew:
                    holds_not = False
                    break  # time has passed: another one may be the best now
            if refused and not self._text.ids and not self._client_begun():
                raise min(refused, key=lambda exc: exc.retry_after_s or 0.0)
            if holds_not and (not refused or self._patience_is_over()):
                self._text.give_up_version()
                continue
            self._check_patience()
            await self._directory.wait_for_news(POLL_AGAIN_S)

    def _note(self, chunk: GenerationChunk) -> None:
        self._text.take(chunk)
        self._progress_s = time.monotonic()
        if chunk.ids:
            self._failures = 0

    def _lost(self, router: RouterConnection, error: MoeClusterError) -> None:
        self._directory.failed(router)
        logger.info("a router was lost after %d tokens of a request: %s", len(self._text.ids), error)
        if self._text.ids:
            self._on_failover()
        if isinstance(error, BatchBroken):
            self._broken_batches += 1
            if self._broken_batches > MAX_BROKEN_BATCHES:
                raise error
        elif not isinstance(error, Unavailable):
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                raise error

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(f"not finished within {self._patience.request_timeout_s:g} s")
        return left_s

    def _check_patience(self) -> None:
        self._left_s()
        if self._directory.ended:
            raise ClusterEnded(self._directory.ended)
        if self._patience_is_over():
            raise Unavailable(f"no router was found within {self._patience.router_patience_s:g} s")

    def _patience_is_over(self) -> bool:
        return time.monotonic() - self._progress_s > self._patience.router_patience_s


def _refuse_cancelled(chunk: GenerationChunk) -> None:
    """A router that ends cancels what it writes. Nothing of such a chunk is taken: the next router writes it."""
    if chunk.finish_reason == "cancelled":
        raise Unavailable("the router gave the request up")
