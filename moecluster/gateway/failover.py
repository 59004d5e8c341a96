"""Streams one request across router failures: when a router is lost, another one continues."""

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
    """One request's stream of chunks, each token exactly once."""

    def __init__(
        self,
        request: GenerationRequest,
        discovery: RouterDiscovery,
        patience: Patience,
        *,
        begun: Callable[[], bool] = lambda: False,
        on_failover: Callable[[], None] = lambda: None,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> None:
        """begun: whether the client already received data, so that full routers are waited for instead of refusing.
        on_tokens: called with each chunk's number of tokens."""
        self._request = ResumableRequest(request)
        self._discovery = discovery
        self._patience = patience
        self._client_begun = begun
        self._on_failover = on_failover
        self._on_tokens = on_tokens
        self._failover = RequestFailover(patience)

    async def chunks(self) -> AsyncGenerator[GenerationChunk]:
        """Yields every token once; the last chunk has a finish_reason, stop or length.

        Raises InvalidMessage or another UserError for a wrong request, RequestFailed for one that cannot be computed,
        Exhausted if routers are full and the request has not started, DeadlineExceeded, BatchBroken if too many of its
        batches broke, ExpertsLost if experts cannot be reloaded, and Unavailable if no router was found in time:
        ClusterEnded as soon as the cluster is down.
        """
        while True:
            self._failover.begin_round()
            for router in self._discovery.candidates():
                timeout_s = self._left_s()
                try:
                    async with aclosing(router.generate(self._request.next_request(), timeout_s)) as chunks:
                        async for chunk in chunks:
                            _refuse_cancelled(chunk)
                            self._note(chunk)
                            yield chunk
                            if chunk.finish_reason:
                                return
                    raise Unavailable(f"router at {router.address}: the stream broke off")
                except MoeClusterError as exc:
                    pinned = bool(self._request.weight_version)
                    if is_loss(exc, pinned=pinned):
                        self._lost(router, exc)
                    self._failover.failed(exc, pinned=pinned)
                if self._request.grew:
                    self._failover.begin_round()
                    break  # time has passed: the best candidate may be another one now
            await self._wait_for_round()

    def _note(self, chunk: GenerationChunk) -> None:
        self._request.take(chunk)
        if chunk.ids:
            self._failover.progressed()
            self._on_tokens(len(chunk.ids))

    def _lost(self, router: RouterConnection, error: MoeClusterError) -> None:
        self._discovery.failed(router)
        logger.info("a router was lost after %d tokens of a request: %s", len(self._request.ids), error)
        if self._request.ids:
            self._on_failover()

    async def _wait_for_round(self) -> None:
        """Waits until the next round. Raises if there will be none."""
        full = self._failover.full
        if full is not None and not self._request.ids and not self._client_begun():
            raise full
        if self._failover.gives_up_version(is_over=self._failover.is_over()):
            self._request.give_up_version()
            return
        self._left_s()
        if self._discovery.ended:
            raise ClusterEnded(self._discovery.ended)
        if self._failover.is_over():
            raise Unavailable(f"no router was found within {self._patience.router_wait_timeout_s:g} s")
        await self._discovery.wait_for_news(POLL_AGAIN_S)

    def _left_s(self) -> float:
        left_s = self._failover.left_s
        if not left_s:
            raise DeadlineExceeded(f"not finished within {self._patience.request_timeout_s:g} s")
        return left_s


def _refuse_cancelled(chunk: GenerationChunk) -> None:
    """A router that shuts down cancels its requests. Drops such a chunk: the next router generates its tokens."""
    if chunk.finish_reason == "cancelled":
        raise Unavailable("the router gave the request up")
