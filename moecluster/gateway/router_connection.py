"""One router, as the front knows it: how busy it is, whether it answers, and the way to it."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio

from moecluster.errors import MoeClusterError, Unavailable
from moecluster.generation import GenerationPiece, GenerationRequest
from moecluster.proto import router_pb2
from moecluster.proto.router_pb2_grpc import RouterServiceStub
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.router.messages import decode_piece, decode_router_status, encode_generation_request
from moecluster.rpc.server import open_async_channel
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import RouterStatus

STATUS_TIMEOUT_S = 2.0
HANGS_AFTER_S = 20.0  # without an answer: its texts are taken elsewhere
AVOID_S = 2.0  # after a failure it is asked last, also if it says that it is well


class KnownRouter:
    """Belongs to one event loop."""

    def __init__(self, address: str, credentials: ClusterCredentials | None = None) -> None:
        """address: host:port. Connects at the first call. credentials: of its cluster."""
        self.address = address
        self.leaving = False  # as the controller says: it shall get no new texts
        self.listed_s = time.monotonic()  # when it was last said to be there
        self.status: RouterStatus | None = None  # None: it does not answer
        self._answered_s = time.monotonic()
        self._failed_s = -AVOID_S
        self._own_then = 0  # texts of ours that the status counts
        self._channel = open_async_channel(address, credentials)
        self._stub: Any = RouterServiceStub(self._channel)
        self._calls: set[Any] = set()

    @property
    def load(self) -> int:
        """Texts that are being written there or wait, and what we have sent there since it said so."""
        said = self.status.running + self.status.waiting if self.status is not None else 0
        return max(said + len(self._calls) - self._own_then, len(self._calls))

    @property
    def standing(self) -> tuple[bool, bool, int]:
        """The lower, the better."""
        failed = self.status is None or time.monotonic() - self._failed_s < AVOID_S
        return failed, self.leaving, self.load

    @property
    def idle(self) -> bool:
        """Whether it writes nothing for us."""
        return not self._calls

    def failed(self) -> None:
        """It has just lost or refused a text."""
        self._failed_s = time.monotonic()

    async def look(self) -> None:
        """Asks how it is. Of one that hangs, the texts are given up."""
        own = len(self._calls)
        try:
            message = await self._stub.Status(router_pb2.RouterStatusRequest(), timeout=STATUS_TIMEOUT_S)
            self.status = decode_router_status(message)
        except (grpc.RpcError, MoeClusterError):
            self.status = None
            if time.monotonic() - self._answered_s > HANGS_AFTER_S:
                self._give_up()
            return
        self._own_then = own
        self.listed_s = self._answered_s = time.monotonic()

    async def generate(self, request: GenerationRequest, timeout_s: float) -> AsyncGenerator[GenerationPiece]:
        """The pieces of a text. Left early, or cancelled, it ends the generation. Raises a MoeClusterError."""
        try:
            call = self._stub.Generate(encode_generation_request(request), timeout=timeout_s)
        except grpc.aio.UsageError as exc:  # the connection is closed
            raise Unavailable(f"router at {self.address}: it was given up meanwhile") from exc
        self._calls.add(call)
        try:
            async for message in call:
                yield decode_piece(message)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, f"router at {self.address}") from exc
        except asyncio.CancelledError:
            # Of the task that reads; or of the call, which was given up, or whose connection was closed.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Unavailable(f"router at {self.address}: it does not answer any more") from None
        finally:
            call.cancel()
            self._calls.discard(call)

    async def close(self) -> None:
        """Ends the connection, and what still runs over it."""
        await self._channel.close()

    def _give_up(self) -> None:
        for call in self._calls:
            call.cancel()
