"""The gRPC server of ExpertService; its Compute stream is in compute_session.py."""

from collections.abc import Iterator
from functools import partial

import grpc

from moecluster.addresses import ListenAddress
from moecluster.errors import InvalidMessage, MoeClusterError
from moecluster.proto import expert_pb2, expert_pb2_grpc
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert import export, messages
from moecluster.rpc.expert.compute_session import ComputeSession
from moecluster.rpc.expert.interface import ExpertHandler
from moecluster.rpc.expert.request_messages import MAX_TIMEOUT_S, decode_load_request, decode_placement_notice
from moecluster.rpc.fields import checked_amount, checked_within, decode_experts, encode_experts
from moecluster.rpc.server import LOOPBACK, MAX_CALLS, RunningServer, start_server
from moecluster.rpc.status_codes import abort_with, answer
from moecluster.types import MessageKey, StepTag

SERVICE = expert_pb2.DESCRIPTOR.services_by_name["ExpertService"].full_name
StepRequest = expert_pb2.ReduceRequest | expert_pb2.PrepareRequest | expert_pb2.CommitRequest | expert_pb2.AbortRequest


def _step(message: StepRequest) -> StepTag:
    if not message.HasField("step"):
        raise InvalidMessage("step", "missing")
    return messages.decode_step(message.step)


class ExpertServicer(expert_pb2_grpc.ExpertServiceServicer):
    """Translates messages to calls of the handler, and the handler's errors to status codes."""

    def __init__(self, handler: ExpertHandler) -> None:
        self._handler = handler

    def Compute(
        self, request_iterator: Iterator[expert_pb2.ComputeRequest], context: grpc.ServicerContext
    ) -> Iterator[expert_pb2.ComputeReply]:
        return ComputeSession(self._handler, request_iterator).replies(context)

    def Load(self, request: expert_pb2.LoadRequest, context: grpc.ServicerContext) -> expert_pb2.LoadReply:
        def load() -> expert_pb2.LoadReply:
            wanted = decode_load_request(request)
            return expert_pb2.LoadReply(loaded_bytes=self._handler.load(wanted))

        return answer(context, load)

    def Unload(self, request: expert_pb2.UnloadRequest, context: grpc.ServicerContext) -> expert_pb2.UnloadReply:
        def unload() -> expert_pb2.UnloadReply:
            self._handler.unload(
                term=request.term,
                experts=decode_experts(request.experts, "experts"),
                drain_timeout_s=checked_within(request.drain_timeout_s, 0, MAX_TIMEOUT_S, "drain_timeout_s"),
            )
            return expert_pb2.UnloadReply()

        return answer(context, unload)

    def SetPlacement(
        self, request: expert_pb2.SetPlacementRequest, context: grpc.ServicerContext
    ) -> expert_pb2.SetPlacementReply:
        def set_placement() -> expert_pb2.SetPlacementReply:
            notice = decode_placement_notice(request)
            self._handler.set_placement(notice)
            return expert_pb2.SetPlacementReply()

        return answer(context, set_placement)

    def Export(
        self, request: expert_pb2.ExportRequest, context: grpc.ServicerContext
    ) -> Iterator[expert_pb2.ExportChunk]:
        try:
            exported = self._handler.export(
                experts=decode_experts(request.experts, "experts"),
                with_optimizer=request.with_optimizer,
                step=request.step,
                incarnation=request.incarnation,
                weight_version=request.weight_version,
            )
            for tensor in exported:
                yield from export.cut(tensor)
        except MoeClusterError as exc:
            abort_with(context, exc)

    def Reduce(self, request: expert_pb2.ReduceRequest, context: grpc.ServicerContext) -> expert_pb2.ReduceReply:
        def reduce() -> expert_pb2.ReduceReply:
            expected = [
                MessageKey(
                    rank=key.rank,
                    micro_batch=key.micro_batch,
                    layer=key.layer,
                    pass_index=key.pass_index,
                    rows=key.rows,
                )
                for key in request.expected
            ]
            result = self._handler.reduce(_step(request), expected)
            return expert_pb2.ReduceReply(incarnation=result.incarnation, square_norm=result.square_norm)

        return answer(context, reduce)

    def Prepare(self, request: expert_pb2.PrepareRequest, context: grpc.ServicerContext) -> expert_pb2.PrepareReply:
        def prepare() -> expert_pb2.PrepareReply:
            incarnation = self._handler.prepare(
                _step(request),
                clip_scale=checked_within(request.clip_scale, 0, 1, "clip_scale"),
                learning_rate=checked_amount(request.learning_rate, "learning_rate"),
            )
            return expert_pb2.PrepareReply(incarnation=incarnation)

        return answer(context, prepare)

    def Commit(self, request: expert_pb2.CommitRequest, context: grpc.ServicerContext) -> expert_pb2.CommitReply:
        return answer(context, lambda: expert_pb2.CommitReply(incarnation=self._handler.commit(_step(request))))

    def Abort(self, request: expert_pb2.AbortRequest, context: grpc.ServicerContext) -> expert_pb2.AbortReply:
        def abort() -> expert_pb2.AbortReply:
            self._handler.abort(_step(request))
            return expert_pb2.AbortReply()

        return answer(context, abort)

    def Status(self, request: expert_pb2.StatusRequest, context: grpc.ServicerContext) -> expert_pb2.StatusReply:
        def status() -> expert_pb2.StatusReply:
            found = self._handler.status(request.training_term, with_snapshot=request.with_snapshot)
            reply = expert_pb2.StatusReply(
                actor=found.actor,
                incarnation=found.incarnation,
                placement_term=found.placement.term,
                generation=found.placement.generation,
                experts=encode_experts(found.experts),
                hosted_bytes=found.hosted_bytes,
                weight_version=found.weight_version,
                training_term=found.training_term,
                rss_bytes=found.rss_bytes,
                checkpoint=found.checkpoint,
                snapshot=found.snapshot,
                computed_rows=found.work.computed_rows,
                expert_runs=found.work.expert_runs,
                busy_s=found.work.busy_s,
                batches=found.work.batches,
                queue_wait_s=found.work.queue_wait_s,
                queue_rows=found.work.queue_rows,
                other_versions=[
                    expert_pb2.HeldVersion(version=version, experts=encode_experts(experts))
                    for version, experts in found.other_versions.items()
                ],
            )
            if found.committed is not None:
                reply.committed.CopyFrom(messages.encode_step(found.committed))
            if found.prepared is not None:
                reply.prepared.CopyFrom(messages.encode_step(found.prepared))
            return reply

        return answer(context, status)


def serve_expert(
    handler: ExpertHandler,
    *,
    credentials: ClusterCredentials | None,
    listen: ListenAddress = LOOPBACK,
    max_calls: int = MAX_CALLS,
) -> RunningServer:
    """Serves an expert actor's experts. credentials as in start_server.

    Raises ResourceError if it cannot listen.
    """
    add_servicer = partial(expert_pb2_grpc.add_ExpertServiceServicer_to_server, ExpertServicer(handler))
    return start_server(SERVICE, add_servicer, listen=listen, credentials=credentials, max_calls=max_calls)
