"""One text, whatever becomes of the routers that write it: what one of them loses, another goes on with."""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from moecluster.errors import ClusterEnded, DeadlineExceeded, MoeClusterError, Unavailable
from moecluster.gateway.router_connection import RouterConnection
from moecluster.gateway.router_discovery import RouterDiscovery
from moecluster.generation import GenerationChunk, GenerationRequest
from moecluster.rpc.router.failover import Patience, RequestFailover, is_loss
from moecluster.rpc.router.resume import ResumableRequest

logger = logging.getLogger(__name__)

POLL_AGAIN_S = 0.5


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
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> None:
        """begun: whether its client was already told something, so that it waits where it would be refused. on_tokens:
        told of each chunk's tokens, as they come."""
        self._text = ResumableRequest(request)
        self._directory = directory
        self._patience = patience
        self._client_begun = begun
        self._on_failover = on_failover
        self._on_tokens = on_tokens
        self._failover = RequestFailover(patience)

    async def chunks(self) -> AsyncGenerator[GenerationChunk]:
        """Every token once; the last chunk has a finish_reason, stop or length.

        Raises InvalidMessage or another UserError for a wrong request, RequestFailed for one that cannot be computed,
        Exhausted when all routers refuse a text that is not begun, DeadlineExceeded, BatchBroken when one batch after
        the other broke that it was in, ExpertsLost where what it needs cannot be loaded, and Unavailable when no router
        was found in time: ClusterEnded as soon as none can be.
        """
        while True:
            self._failover.begin_round()
            for router in self._directory.candidates():
                timeout_s = self._left_s()
                try:
                    async with aclosing(router.generate(self._text.next_request(), timeout_s)) as chunks:
                        async for chunk in chunks:
                            _refuse_cancelled(chunk)
                            self._note(chunk)
                            yield chunk
                            if chunk.finish_reason:
                                return
                    raise Unavailable(f"router at {router.address}: the stream broke off")
                except MoeClusterError as exc:
                    pinned = bool(self._text.weight_version)
                    if is_loss(exc, pinned=pinned):
                        self._lost(router, exc)
                    self._failover.failed(exc, pinned=pinned)
                if self._text.grew:
                    self._failover.begin_round()
                    break  # time has passed: another one may be the best now
            await self._wait_for_round()

    def _note(self, chunk: GenerationChunk) -> None:
        self._text.take(chunk)
        if chunk.ids:
            self._failover.progressed()
            self._on_tokens(len(chunk.ids))

    def _lost(self, router: RouterConnection, error: MoeClusterError) -> None:
        self._directory.failed(router)
        logger.info("a router was lost after %d tokens of a request: %s", len(self._text.ids), error)
        if self._text.ids:
            self._on_failover()

    async def _wait_for_round(self) -> None:
        """Returns when routers are to be asked again. Raises why they are not."""
        full = self._failover.full
        if full is not None and not self._text.ids and not self._client_begun():
            raise full
        if self._failover.gives_up_version(is_over=self._failover.is_over()):
            self._text.give_up_version()
            return
        self._left_s()
        if self._directory.ended:
            raise ClusterEnded(self._directory.ended)
        if self._failover.is_over():
            raise Unavailable(f"no router was found within {self._patience.router_wait_timeout_s:g} s")
        await self._directory.wait_for_news(POLL_AGAIN_S)

    def _left_s(self) -> float:
        left_s = self._failover.left_s
        if not left_s:
            raise DeadlineExceeded(f"not finished within {self._patience.request_timeout_s:g} s")
        return left_s


def _refuse_cancelled(chunk: GenerationChunk) -> None:
    """A router that ends cancels what it writes. Nothing of such a chunk is taken: the next router writes it."""
    if chunk.finish_reason == "cancelled":
        raise Unavailable("the router gave the request up")
