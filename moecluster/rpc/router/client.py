"""A router's unary calls, for commands."""

from types import TracebackType
from typing import Self

import grpc

from moecluster.proto import router_pb2
from moecluster.proto.router_pb2_grpc import RouterServiceStub
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.router.messages import decode_router_status
from moecluster.rpc.server import open_channel
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import RouterStatus

TIMEOUT_S = 5.0


class RouterCalls:
    """A connection to the router at host:port. Every call ends within timeout_s; failures are MoeClusterErrors."""

    def __init__(
        self, address: str, *, timeout_s: float = TIMEOUT_S, credentials: ClusterCredentials | None = None
    ) -> None:
        """Connects at the first call."""
        self.address = address
        self._timeout_s = timeout_s
        self._channel = open_channel(address, credentials)
        self._stub = RouterServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def status(self) -> RouterStatus:
        """Returns the router's status."""
        try:
            return decode_router_status(self._stub.Status(router_pb2.RouterStatusRequest(), timeout=self._timeout_s))
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, f"router at {self.address}") from exc
