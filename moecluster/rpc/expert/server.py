"""ExpertService at the server's edge: unary orders here, the Compute stream in compute_session.py."""

import re
from collections.abc import Iterator, Sequence

import grpc

from moecluster.errors import InvalidMessage, MoeClusterError
from moecluster.proto import expert_pb2, expert_pb2_grpc, tensor_pb2
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert import export, messages
from moecluster.rpc.expert.compute_session import ComputeSession
from moecluster.rpc.expert.interface import ExpertHandler
from moecluster.rpc.server import MAX_CALLS, RunningServer, start_server
from moecluster.rpc.status_codes import abort_with, answer
from moecluster.types import ActorAddress, ExpertId, MessageKey, OptimizerSettings, StepTag

MAX_EXPERTS_PER_REQUEST = 2**16
MAX_TIMEOUT_S = 3600.0
HOST_PORT = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}:[0-9]{1,5}")
StepRequest = expert_pb2.ReduceRequest | expert_pb2.PrepareRequest | expert_pb2.CommitRequest | expert_pb2.AbortRequest


def _experts(refs: "list[tensor_pb2.ExpertRef]") -> tuple[ExpertId, ...]:
    if len(refs) > MAX_EXPERTS_PER_REQUEST:
        raise InvalidMessage(f"experts: {len(refs)}, at most {MAX_EXPERTS_PER_REQUEST}")
    experts = tuple(ExpertId(layer=ref.layer, index=ref.index) for ref in refs)
    if any(e.layer < 0 or e.index < 0 for e in experts):
        raise InvalidMessage("experts: a negative layer or index")
    return experts


def _refs(experts: Sequence[ExpertId]) -> list[tensor_pb2.ExpertRef]:
    return [tensor_pb2.ExpertRef(layer=e.layer, index=e.index) for e in experts]


def _step(message: StepRequest) -> StepTag:
    if not message.HasField("step"):
        raise InvalidMessage("step: missing")
    return messages.decode_step(message.step)


def _optimizer(request: expert_pb2.LoadRequest) -> OptimizerSettings | None:
    if not request.HasField("optimizer"):
        return None
    message = request.optimizer
    if message.name not in ("adamw", "sgd"):
        raise InvalidMessage(f"optimizer.name: {message.name!r} is none of adamw, sgd")
    settings = OptimizerSettings(
        name=message.name,
        beta1=message.beta1,
        beta2=message.beta2,
        eps=message.eps,
        weight_decay=message.weight_decay,
        momentum=message.momentum,
    )
    if not (0 <= settings.beta1 < 1 and 0 <= settings.beta2 < 1 and 0 <= settings.momentum < 1):
        raise InvalidMessage("optimizer: beta1, beta2 and momentum lie in [0, 1)")
    if not (settings.eps >= 0 and settings.weight_decay >= 0):
        raise InvalidMessage("optimizer: eps and weight_decay are not negative")
    return settings


def _peer(request: expert_pb2.LoadRequest) -> ActorAddress | None:
    if not request.peer_address:
        if request.peer_incarnation:
            raise InvalidMessage("peer_address: missing, and there is a peer_incarnation")
        return None
    if not HOST_PORT.fullmatch(request.peer_address):
        raise InvalidMessage(f"peer_address: {request.peer_address[:80]!r} is no host:port")
    if not request.peer_incarnation:
        raise InvalidMessage("peer_incarnation: missing")
    # The order does not name the peer, and nothing here asks for its name but errors.
    return ActorAddress(actor=request.peer_address, address=request.peer_address, incarnation=request.peer_incarnation)


class ExpertServicer(expert_pb2_grpc.ExpertServiceServicer):
    """Translates messages to calls of the handler, and its errors to status codes."""

    def __init__(self, handler: ExpertHandler) -> None:
        self._handler = handler

    def Compute(
        self, request_iterator: Iterator[expert_pb2.ComputeRequest], context: grpc.ServicerContext
    ) -> Iterator[expert_pb2.ComputeReply]:
        return ComputeSession(self._handler, request_iterator).replies(context)

    def Load(self, request: expert_pb2.LoadRequest, context: grpc.ServicerContext) -> expert_pb2.LoadReply:
        def load() -> expert_pb2.LoadReply:
            if not 0 < request.timeout_s <= MAX_TIMEOUT_S:
                raise InvalidMessage(f"timeout_s: {request.timeout_s}, not within 0 and {MAX_TIMEOUT_S:g}")
            loaded_bytes = self._handler.load(
                term=request.term,
                experts=_experts(list(request.experts)),
                checkpoint=request.checkpoint,
                dtype=request.dtype,
                weight_version=request.weight_version,
                optimizer=_optimizer(request),
                replace=request.replace,
                training_term=request.training_term,
                timeout_s=request.timeout_s,
                peer=_peer(request),
                max_bytes_per_s=request.max_bytes_per_s,
            )
            return expert_pb2.LoadReply(loaded_bytes=loaded_bytes)

        return answer(context, load)

    def Unload(self, request: expert_pb2.UnloadRequest, context: grpc.ServicerContext) -> expert_pb2.UnloadReply:
        def unload() -> expert_pb2.UnloadReply:
            if not 0 <= request.drain_timeout_s <= MAX_TIMEOUT_S:
                raise InvalidMessage(f"drain_timeout_s: {request.drain_timeout_s}, not within 0 and {MAX_TIMEOUT_S:g}")
            self._handler.unload(
                term=request.term,
                experts=_experts(list(request.experts)),
                drain_timeout_s=request.drain_timeout_s,
            )
            return expert_pb2.UnloadReply()

        return answer(context, unload)

    def SetPlacement(
        self, request: expert_pb2.SetPlacementRequest, context: grpc.ServicerContext
    ) -> expert_pb2.SetPlacementReply:
        def set_placement() -> expert_pb2.SetPlacementReply:
            self._handler.set_placement(
                term=request.term,
                generation=request.generation,
                checkpoint=request.checkpoint,
                snapshot=request.snapshot,
                weight_version=request.weight_version,
                weight_versions=tuple(request.weight_versions),
            )
            return expert_pb2.SetPlacementReply()

        return answer(context, set_placement)

    def Export(
        self, request: expert_pb2.ExportRequest, context: grpc.ServicerContext
    ) -> Iterator[expert_pb2.ExportChunk]:
        try:
            exported = self._handler.export(
                experts=_experts(list(request.experts)),
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
            if not (0 <= request.clip_scale <= 1 and 0 <= request.learning_rate < float("inf")):
                raise InvalidMessage("clip_scale lies in [0, 1] and learning_rate is finite and not negative")
            incarnation = self._handler.prepare(
                _step(request), clip_scale=request.clip_scale, learning_rate=request.learning_rate
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
                placement_term=found.placement[0],
                generation=found.placement[1],
                experts=_refs(found.experts),
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
                    expert_pb2.HeldVersion(version=version, experts=_refs(experts))
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
    host: str = "127.0.0.1",
    port: int = 0,
    max_calls: int = MAX_CALLS,
) -> RunningServer:
    """Serves an expert actor's experts. credentials as in start_server.

    Raises ResourceError if the port is in use.
    """

    def add_services(server: grpc.Server) -> list[str]:
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(ExpertServicer(handler), server)
        return [expert_pb2.DESCRIPTOR.services_by_name["ExpertService"].full_name]

    return start_server(add_services, host=host, port=port, credentials=credentials, max_calls=max_calls)
