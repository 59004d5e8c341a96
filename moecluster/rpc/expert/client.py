"""The gRPC client of ExpertService except for the Compute stream."""

from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from moecluster.errors import Unavailable
from moecluster.proto import expert_pb2
from moecluster.proto.expert_pb2_grpc import ExpertServiceStub
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert import export as export_chunks
from moecluster.rpc.expert import messages
from moecluster.rpc.expert.interface import ExportedTensor
from moecluster.rpc.expert.request_messages import encode_load_request, encode_placement_notice
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.rpc.fields import decode_experts, encode_experts
from moecluster.rpc.server import open_channel
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import (
    ActorWork,
    ExpertActorStatus,
    ExpertId,
    MessageKey,
    PlacementNumber,
    ReduceResult,
    StepTag,
)

EXPORT_TIMEOUT_S = 600.0


class GrpcExpertControl:
    """The ExpertControl at host:port. Calls raise MoeClusterError; each has a timeout, timeout_s unless it has its
    own."""

    def __init__(
        self, name: str, address: str, *, timeout_s: float = 30.0, credentials: ClusterCredentials | None = None
    ) -> None:
        self.name = name
        self._timeout_s = timeout_s
        self._channel = open_channel(address, credentials)
        self._stub = ExpertServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def load(self, request: LoadRequest) -> int:
        return int(self._call(self._stub.Load, encode_load_request(request), request.timeout_s).loaded_bytes)

    def unload(self, *, term: int, experts: Sequence[ExpertId], drain_timeout_s: float = 0.0) -> None:
        request = expert_pb2.UnloadRequest(term=term, experts=encode_experts(experts), drain_timeout_s=drain_timeout_s)
        self._call(self._stub.Unload, request, self._timeout_s + drain_timeout_s)

    def set_placement(self, notice: PlacementNotice) -> None:
        self._call(self._stub.SetPlacement, encode_placement_notice(notice))

    def export(
        self,
        *,
        experts: Sequence[ExpertId],
        with_optimizer: bool,
        step: int = 0,
        incarnation: str = "",
        weight_version: int = 0,
    ) -> Iterator[ExportedTensor]:
        request = expert_pb2.ExportRequest(
            experts=encode_experts(experts),
            with_optimizer=with_optimizer,
            step=step,
            incarnation=incarnation,
            weight_version=weight_version,
        )
        try:
            yield from export_chunks.assemble(self._stub.Export(request, timeout=EXPORT_TIMEOUT_S))
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, self.name) from exc

    def reduce(self, tag: StepTag, expected: Sequence[MessageKey]) -> ReduceResult:
        request = expert_pb2.ReduceRequest(
            step=messages.encode_step(tag),
            expected=[
                expert_pb2.MessageKey(
                    rank=key.rank,
                    micro_batch=key.micro_batch,
                    layer=key.layer,
                    pass_index=key.pass_index,
                    rows=key.rows,
                )
                for key in expected
            ],
        )
        reply = self._call(self._stub.Reduce, request)
        return ReduceResult(incarnation=reply.incarnation, square_norm=reply.square_norm)

    def prepare(self, tag: StepTag, *, clip_scale: float, learning_rate: float) -> str:
        request = expert_pb2.PrepareRequest(
            step=messages.encode_step(tag), clip_scale=clip_scale, learning_rate=learning_rate
        )
        return str(self._call(self._stub.Prepare, request).incarnation)

    def commit(self, tag: StepTag) -> str:
        return str(self._call(self._stub.Commit, expert_pb2.CommitRequest(step=messages.encode_step(tag))).incarnation)

    def abort(self, tag: StepTag) -> None:
        self._call(self._stub.Abort, expert_pb2.AbortRequest(step=messages.encode_step(tag)))

    def status(self, training_term: int = 0, *, with_snapshot: bool = False) -> ExpertActorStatus:
        request = expert_pb2.StatusRequest(training_term=training_term, with_snapshot=with_snapshot)
        reply = self._call(self._stub.Status, request)
        return ExpertActorStatus(
            actor=reply.actor,
            incarnation=reply.incarnation,
            placement=PlacementNumber(reply.placement_term, reply.generation),
            experts=decode_experts(reply.experts, "experts"),
            hosted_bytes=reply.hosted_bytes,
            weight_version=reply.weight_version,
            training_term=reply.training_term,
            committed=messages.decode_step(reply.committed) if reply.HasField("committed") else None,
            prepared=messages.decode_step(reply.prepared) if reply.HasField("prepared") else None,
            rss_bytes=reply.rss_bytes,
            checkpoint=reply.checkpoint,
            snapshot=reply.snapshot,
            work=ActorWork(
                computed_rows=reply.computed_rows,
                expert_runs=reply.expert_runs,
                busy_s=reply.busy_s,
                batches=reply.batches,
                queue_wait_s=reply.queue_wait_s,
                queue_rows=reply.queue_rows,
            ),
            other_versions={
                held.version: decode_experts(held.experts, "other_versions.experts") for held in reply.other_versions
            },
        )

    def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout_s or self._timeout_s)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, self.name) from exc
        except ValueError as exc:  # the channel was closed
            raise Unavailable(f"{self.name}: {exc}") from exc
