"""The in-process twin of the Compute stream: the same interface, no sockets."""

from concurrent.futures import Future

from moecluster.errors import MoeClusterError
from moecluster.rpc.interfaces import ComputeHandler
from moecluster.types import ComputeBatch, ComputeResult


class InProcessTransport:
    """Hands batches straight to an expert service of this process."""

    name = "in-process"

    def __init__(self, handler: ComputeHandler) -> None:
        self._handler = handler
        self.incarnation = handler.incarnation

    def submit(self, batch: ComputeBatch) -> "Future[ComputeResult]":
        future: Future[ComputeResult] = Future()

        def reply(outcome: ComputeResult | MoeClusterError) -> None:
            if isinstance(outcome, MoeClusterError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self._handler.submit(batch, reply)
        return future

    def close(self) -> None:
        """Nothing is held."""
