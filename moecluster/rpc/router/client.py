"""A router's unary calls, for commands: its status, and training in its process."""

from moecluster.errors import StateLost
from moecluster.proto import router_pb2
from moecluster.proto.router_pb2_grpc import RouterServiceStub
from moecluster.rpc.connection import TIMEOUT_S, Connection
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.router.messages import decode_router_status
from moecluster.rpc.router.training_messages import RunGone, RunProgress, StartRequest, decode_progress, encode_start
from moecluster.types import RouterStatus

FOLLOW_TIMEOUT_S = 60.0  # the router's process also computes
RELOAD_TIMEOUT_S = 120.0  # it loads a trunk


class RouterCalls(Connection):
    """A connection to the router at host:port. Failures are MoeClusterErrors."""

    def __init__(
        self, address: str, *, timeout_s: float = TIMEOUT_S, credentials: ClusterCredentials | None = None
    ) -> None:
        super().__init__(address, server="router", timeout_s=timeout_s, credentials=credentials)
        self._stub = RouterServiceStub(self.channel)

    def status(self) -> RouterStatus:
        """Returns the router's status."""
        return decode_router_status(self.call(self._stub.Status, router_pb2.RouterStatusRequest()))

    def reload(self, checkpoint: str) -> None:
        """Has the router load trunk and tokenizer from a directory. Raises UserError."""
        self.call(self._stub.Reload, router_pb2.ReloadRequest(checkpoint=checkpoint), RELOAD_TIMEOUT_S)

    def start_training(self, request: StartRequest) -> None:
        """Begins a training run in the router's process. Raises UserError."""
        self.call(self._stub.StartTraining, encode_start(request))

    def follow_training(self, run_id: str, since: int) -> RunProgress:
        """Returns the run's events from number `since` on. Raises RunGone if the router's process has no such run."""
        request = router_pb2.FollowTrainingRequest(run_id=run_id, since=since)
        try:
            return decode_progress(self.call(self._stub.FollowTraining, request, FOLLOW_TIMEOUT_S))
        except StateLost as exc:
            raise RunGone(str(exc)) from exc

    def stop_training(self, run_id: str) -> None:
        """Ends the run after its current event."""
        self.call(self._stub.StopTraining, router_pb2.StopTrainingRequest(run_id=run_id))
