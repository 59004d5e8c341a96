"""The gateway's connection to one router: its load, its status, and the requests sent to it."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio

from moecluster.errors import MoeClusterError, Unavailable
from moecluster.generation import GenerationChunk, GenerationRequest
from moecluster.proto import router_pb2
from moecluster.proto.router_pb2_grpc import RouterServiceStub
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.router.messages import decode_chunk, decode_router_status, encode_generation_request
from moecluster.rpc.server import open_async_channel
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import RouterStatus

STATUS_TIMEOUT_S = 2.0
HANGS_AFTER_S = 20.0  # without an answer: its requests move to other routers
AVOID_S = 2.0  # after a failure it is asked last, even if its status is good


class RouterConnection:
    """Belongs to one event loop."""

    def __init__(self, address: str, credentials: ClusterCredentials | None = None) -> None:
        """address: host:port. Connects at the first call. credentials: those of its cluster."""
        self.address = address
        self.leaving = False  # according to the controller: it gets no new requests
        self.listed_s = time.monotonic()  # when it last answered or was named by the controller or rediscovery
        self.status: RouterStatus | None = None  # None: it does not answer
        self._answered_s = time.monotonic()
        self._failed_s = -AVOID_S
        self._own_at_status = 0  # calls of ours that the status counts
        self._channel = open_async_channel(address, credentials)
        self._stub: Any = RouterServiceStub(self._channel)
        self._calls: set[Any] = set()

    @property
    def load(self) -> int:
        """Requests that run or wait there by its last status, plus those that we have sent since."""
        reported = self.status.running + self.status.waiting if self.status is not None else 0
        return max(reported + len(self._calls) - self._own_at_status, len(self._calls))

    @property
    def preference(self) -> tuple[bool, bool, int]:
        """Sort key: (failed, leaving, load); the lowest router is asked first."""
        failed = self.status is None or time.monotonic() - self._failed_s < AVOID_S
        return failed, self.leaving, self.load

    @property
    def idle(self) -> bool:
        """Whether no request of ours runs there."""
        return not self._calls

    def failed(self) -> None:
        """Notes that it has just failed a request."""
        self._failed_s = time.monotonic()

    async def poll(self) -> None:
        """Asks for its status. Cancels our requests there if it has not answered for HANGS_AFTER_S."""
        own = len(self._calls)
        try:
            message = await self._stub.Status(router_pb2.RouterStatusRequest(), timeout=STATUS_TIMEOUT_S)
            self.status = decode_router_status(message)
        except (grpc.RpcError, MoeClusterError):
            self.status = None
            if time.monotonic() - self._answered_s > HANGS_AFTER_S:
                self._give_up()
            return
        self._own_at_status = own
        self.listed_s = self._answered_s = time.monotonic()

    async def generate(self, request: GenerationRequest, timeout_s: float) -> AsyncGenerator[GenerationChunk]:
        """Yields the chunks of a request. Closing or cancelling it ends the generation. Raises a MoeClusterError."""
        try:
            call = self._stub.Generate(encode_generation_request(request), timeout=timeout_s)
        except grpc.aio.UsageError as exc:  # the connection is closed
            raise Unavailable(f"router at {self.address}: it was given up meanwhile") from exc
        self._calls.add(call)
        try:
            async for message in call:
                yield decode_chunk(message)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, f"router at {self.address}") from exc
        except asyncio.CancelledError:
            # Either the reading task was cancelled, or the call: by _give_up, or since its connection was closed.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Unavailable(f"router at {self.address}: it does not answer any more") from None
        finally:
            call.cancel()
            self._calls.discard(call)

    async def close(self) -> None:
        """Closes the connection and ends the calls on it."""
        await self._channel.close()

    def _give_up(self) -> None:
        for call in self._calls:
            call.cancel()
