"""What the clients of one server's unary calls share: a channel, deadlines, and errors as MoeClusterErrors."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc

from moecluster.errors import Unavailable
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.server import open_channel
from moecluster.rpc.status_codes import from_rpc_error

TIMEOUT_S = 10.0


class Connection:
    """A channel to one server. Every call ends within its time-out."""

    def __init__(self, address: str, *, server: str, timeout_s: float, credentials: ClusterCredentials | None) -> None:
        """Connects at the first call. address: host:port. server: what listens there, for error messages."""
        self.address = address
        self.channel = open_channel(address, credentials)
        self.timeout_s = timeout_s
        self._server = server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; later calls raise Unavailable."""
        self.channel.close()

    def call(self, method: Callable[..., Any], request: Any, timeout_s: float | None = None) -> Any:
        """Returns the reply. timeout_s: instead of the connection's. Raises a MoeClusterError: UserError for what a
        user can fix, Unavailable if the server does not answer."""
        try:
            return method(request, timeout=timeout_s or self.timeout_s)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, f"{self._server} at {self.address}") from exc
        except ValueError as exc:  # the channel was closed
            raise Unavailable(f"{self._server} at {self.address}: {exc}") from exc
