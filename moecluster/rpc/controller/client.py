"""The controller's unary calls, for users and training."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc

from moecluster.errors import Unavailable
from moecluster.proto import controller_pb2
from moecluster.proto.controller_pb2_grpc import ControllerServiceStub
from moecluster.rpc.controller.load_messages import decode_cluster_loads
from moecluster.rpc.controller.operation_messages import decode_operation, decode_operations, decode_plan
from moecluster.rpc.controller.status_messages import decode_status
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.fields import encode_expert
from moecluster.rpc.server import open_channel
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import ClusterLoads, ControllerStatus, ExpertId, Operation, PlanPreview

TIMEOUT_S = 10.0
CHECK_TIMEOUT_S = 60.0  # of update, which checks the checkpoint first

AnswerT = TypeVar("AnswerT")


class ControllerCalls:
    """A connection to the controller at host:port. Every call ends within timeout_s; failures are MoeClusterErrors:
    UserError for what a user can fix, Unavailable if the controller does not answer.

    Changes are operations: a call returns the operation in its current state, and `operation` polls it. A caller that
    passes its own operation_id may repeat the call without requesting the change twice.
    """

    def __init__(
        self, address: str, *, timeout_s: float = TIMEOUT_S, credentials: ClusterCredentials | None = None
    ) -> None:
        """Connects at the first call."""
        self.address = address
        self._timeout_s = timeout_s
        self._channel = open_channel(address, credentials)
        self._stub = ControllerServiceStub(self._channel)

    def __enter__(self) -> "ControllerCalls":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; later calls raise Unavailable."""
        self._channel.close()

    def status(self) -> ControllerStatus:
        """Returns the cluster as its controller sees it."""
        return self._call(self._stub.Status, controller_pb2.ControllerStatusRequest(), decode_status)

    def set_checkpoint(self, checkpoint: str) -> None:
        """Sets the directory that lost experts are loaded from."""
        request = controller_pb2.SetCheckpointRequest(checkpoint=checkpoint)
        self._call(self._stub.SetCheckpoint, request, _nothing)

    def loads(self) -> ClusterLoads:
        """Returns what was counted since the controller started."""
        return self._call(self._stub.Loads, controller_pb2.LoadsRequest(), decode_cluster_loads)

    def scale(self, expert_actors: int, *, operation_id: str = "") -> Operation:
        """Requests a number of expert actors."""
        request = controller_pb2.ScaleRequest(operation_id=operation_id, expert_actors=expert_actors)
        return self._call(self._stub.Scale, request, decode_operation)

    def scale_routers(self, routers: int, *, operation_id: str = "") -> Operation:
        """Requests a number of routers."""
        request = controller_pb2.ScaleRequest(operation_id=operation_id, routers=routers)
        return self._call(self._stub.Scale, request, decode_operation)

    def drain(self, node: str, *, operation_id: str = "") -> Operation:
        """Requests that a node, or the expert actor of that name, be drained: its experts move elsewhere, then it
        ends."""
        request = controller_pb2.DrainRequest(operation_id=operation_id, node=node)
        return self._call(self._stub.Drain, request, decode_operation)

    def place(self, expert: ExpertId, actors: Sequence[str], *, operation_id: str = "") -> Operation:
        """Requests replicas of an expert on exactly these actors; none: the expert is cold until a token needs it."""
        request = controller_pb2.PlaceRequest(operation_id=operation_id, expert=encode_expert(expert), actors=actors)
        return self._call(self._stub.Place, request, decode_operation)

    def update(self, checkpoint: str, *, operation_id: str = "") -> Operation:
        """Requests that all weights be replaced by those of a directory, while serving."""
        request = controller_pb2.UpdateRequest(operation_id=operation_id, checkpoint=checkpoint)
        return self._call(self._stub.Update, request, decode_operation, max(self._timeout_s, CHECK_TIMEOUT_S))

    def plan(self, policy: str = "") -> PlanPreview:
        """Returns what a policy, by default the cluster's, would do now, without doing it."""
        return self._call(self._stub.Plan, controller_pb2.PlanRequest(policy=policy), decode_plan)

    def operation(self, operation_id: str) -> Operation:
        """Returns an operation in its current state."""
        return self._call(
            self._stub.GetOperation, controller_pb2.GetOperationRequest(id=operation_id), decode_operation
        )

    def operations(self, limit: int = 0) -> tuple[Operation, ...]:
        """Returns at most limit operations, newest first; 0: all that are kept."""
        request = controller_pb2.ListOperationsRequest(limit=limit)
        return self._call(self._stub.ListOperations, request, decode_operations)

    def shut_down(self) -> None:
        """Requests that every process of the cluster be ended, the controller last. Returns when that has begun."""
        self._call(self._stub.Shutdown, controller_pb2.ShutdownRequest(), _nothing)

    def _call(
        self,
        method: Callable[..., Any],
        request: Any,
        decode: Callable[[Any], AnswerT],
        timeout_s: float | None = None,
    ) -> AnswerT:
        try:
            reply = method(request, timeout=timeout_s or self._timeout_s)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, f"controller at {self.address}") from exc
        except ValueError as exc:  # the channel was closed
            raise Unavailable(f"controller at {self.address}: {exc}") from exc
        return decode(reply)


def controller_status(
    address: str, *, timeout_s: float = 5.0, credentials: ClusterCredentials | None = None
) -> ControllerStatus:
    """Returns the cluster as its controller sees it. Raises a MoeClusterError, Unavailable if there is no answer."""
    with ControllerCalls(address, timeout_s=timeout_s, credentials=credentials) as controller:
        return controller.status()


def set_checkpoint(
    address: str, checkpoint: str, *, timeout_s: float = TIMEOUT_S, credentials: ClusterCredentials | None = None
) -> None:
    """Sets the directory that the controller loads lost experts from. Raises a MoeClusterError."""
    with ControllerCalls(address, timeout_s=timeout_s, credentials=credentials) as controller:
        controller.set_checkpoint(checkpoint)


def _nothing(reply: object) -> None:
    """Decodes an empty reply."""
