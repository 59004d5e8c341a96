"""In-process implementations of ExpertTransport and PeerExports, without sockets."""

from collections.abc import Iterator
from concurrent.futures import Future

from moecluster.errors import MoeClusterError
from moecluster.rpc.expert.interface import ComputeHandler, ExpertControl, ExportedTensor, Pace
from moecluster.types import ComputeBatch, ComputeResult, ExpertId


class InProcessTransport:
    """Passes batches directly to an expert service of this process."""

    name, reason = "in-process", "best"
    shortage = ""

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


class InProcessPeerExports:
    """PeerExports from one incarnation of an expert service of this process."""

    def __init__(self, peer: ExpertControl, incarnation: str) -> None:
        self._peer = peer
        self._incarnation = incarnation

    def tensors(
        self, expert: ExpertId, *, weight_version: int = 0, max_tensor_bytes: int, timeout_s: float, pace: Pace
    ) -> Iterator[ExportedTensor]:
        for tensor in self._peer.export(
            experts=[expert], with_optimizer=False, incarnation=self._incarnation, weight_version=weight_version
        ):
            pace(tensor.value.nbytes)
            yield tensor

    def close(self) -> None:
        """Nothing is held."""
