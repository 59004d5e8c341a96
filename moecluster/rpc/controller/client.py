"""The controller's unary calls, for users and training."""

from collections.abc import Sequence

from moecluster.proto import controller_pb2
from moecluster.proto.controller_pb2_grpc import ControllerServiceStub
from moecluster.rpc.connection import TIMEOUT_S, Connection
from moecluster.rpc.controller.load_messages import decode_cluster_loads
from moecluster.rpc.controller.operation_messages import decode_operation, decode_operations, decode_plan
from moecluster.rpc.controller.status_messages import decode_status
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.fields import encode_expert
from moecluster.types import ClusterLoads, ControllerStatus, ExpertId, Operation, PlanPreview

CHECK_TIMEOUT_S = 60.0  # of update, which checks the checkpoint first


class ControllerCalls(Connection):
    """A connection to the controller at host:port. Every call ends within timeout_s; failures are MoeClusterErrors:
    UserError for what a user can fix, Unavailable if the controller does not answer.

    Changes are operations: a call returns the operation in its current state, and `operation` polls it. A caller that
    passes its own operation_id may repeat the call without requesting the change twice.
    """

    def __init__(
        self, address: str, *, timeout_s: float = TIMEOUT_S, credentials: ClusterCredentials | None = None
    ) -> None:
        super().__init__(address, server="controller", timeout_s=timeout_s, credentials=credentials)
        self._stub = ControllerServiceStub(self.channel)

    def status(self) -> ControllerStatus:
        """Returns the cluster as its controller sees it."""
        return decode_status(self.call(self._stub.Status, controller_pb2.ControllerStatusRequest()))

    def set_checkpoint(self, checkpoint: str) -> None:
        """Sets the directory that lost experts are loaded from."""
        request = controller_pb2.SetCheckpointRequest(checkpoint=checkpoint)
        self.call(self._stub.SetCheckpoint, request)

    def loads(self) -> ClusterLoads:
        """Returns what was counted since the controller started."""
        return decode_cluster_loads(self.call(self._stub.Loads, controller_pb2.LoadsRequest()))

    def scale(self, expert_actors: int, *, operation_id: str = "") -> Operation:
        """Requests a number of expert actors."""
        request = controller_pb2.ScaleRequest(operation_id=operation_id, expert_actors=expert_actors)
        return decode_operation(self.call(self._stub.Scale, request))

    def scale_routers(self, routers: int, *, operation_id: str = "") -> Operation:
        """Requests a number of routers."""
        request = controller_pb2.ScaleRequest(operation_id=operation_id, routers=routers)
        return decode_operation(self.call(self._stub.Scale, request))

    def drain(self, node: str, *, operation_id: str = "") -> Operation:
        """Requests that a node, or the expert actor of that name, be drained: its experts move elsewhere, then it
        ends."""
        request = controller_pb2.DrainRequest(operation_id=operation_id, node=node)
        return decode_operation(self.call(self._stub.Drain, request))

    def place(self, expert: ExpertId, actors: Sequence[str], *, operation_id: str = "") -> Operation:
        """Requests replicas of an expert on exactly these actors; none: the expert is cold until a token needs it."""
        request = controller_pb2.PlaceRequest(operation_id=operation_id, expert=encode_expert(expert), actors=actors)
        return decode_operation(self.call(self._stub.Place, request))

    def update(self, checkpoint: str, *, operation_id: str = "") -> Operation:
        """Requests that all weights be replaced by those of a directory, while serving."""
        request = controller_pb2.UpdateRequest(operation_id=operation_id, checkpoint=checkpoint)
        return decode_operation(self.call(self._stub.Update, request, max(self.timeout_s, CHECK_TIMEOUT_S)))

    def plan(self, policy: str = "") -> PlanPreview:
        """Returns what a policy, by default the cluster's, would do now, without doing it."""
        return decode_plan(self.call(self._stub.Plan, controller_pb2.PlanRequest(policy=policy)))

    def operation(self, operation_id: str) -> Operation:
        """Returns an operation in its current state."""
        return decode_operation(self.call(self._stub.GetOperation, controller_pb2.GetOperationRequest(id=operation_id)))

    def operations(self, limit: int = 0) -> tuple[Operation, ...]:
        """Returns at most limit operations, newest first; 0: all that are kept."""
        request = controller_pb2.ListOperationsRequest(limit=limit)
        return decode_operations(self.call(self._stub.ListOperations, request))

    def shut_down(self) -> None:
        """Requests that every process of the cluster be ended, the controller last. Returns when that has begun."""
        self.call(self._stub.Shutdown, controller_pb2.ShutdownRequest())


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
