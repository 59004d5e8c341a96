"""A router's unary calls, for commands: its status, and training in its process."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc

from moecluster.errors import StateLost
from moecluster.proto import router_pb2
from moecluster.proto.router_pb2_grpc import RouterServiceStub
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.router.messages import decode_router_status
from moecluster.rpc.router.training_messages import RunGone, RunProgress, StartRequest, decode_progress, encode_start
from moecluster.rpc.server import open_channel
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import RouterStatus

TIMEOUT_S = 10.0
FOLLOW_TIMEOUT_S = 60.0  # the router's process also computes
RELOAD_TIMEOUT_S = 120.0  # it loads a trunk


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
        return decode_router_status(self._call(self._stub.Status, router_pb2.RouterStatusRequest()))

    def reload(self, checkpoint: str) -> None:
        """Has the router load trunk and tokenizer from a directory. Raises UserError."""
        self._call(self._stub.Reload, router_pb2.ReloadRequest(checkpoint=checkpoint), RELOAD_TIMEOUT_S)

    def start_training(self, request: StartRequest) -> None:
        """Begins a training run in the router's process. Raises UserError."""
        self._call(self._stub.StartTraining, encode_start(request))

    def follow_training(self, run_id: str, since: int) -> RunProgress:
        """Returns the run's events from number `since` on. Raises RunGone if the router's process has no such run."""
        request = router_pb2.FollowTrainingRequest(run_id=run_id, since=since)
        try:
            return decode_progress(self._call(self._stub.FollowTraining, request, FOLLOW_TIMEOUT_S))
        except StateLost as exc:
            raise RunGone(str(exc)) from exc

    def stop_training(self, run_id: str) -> None:
        """Ends the run after its current event."""
        self._call(self._stub.StopTraining, router_pb2.StopTrainingRequest(run_id=run_id))

    def _call(self, method: Callable[..., Any], request: Any, timeout_s: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout_s or self._timeout_s)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, f"router at {self.address}") from exc
