"""Targets: every method of every gRPC service, as its server calls it, over real expert actors, a controller, a router
and a checkpoint's files. No socket lies between; whatever gRPC could not send on is found."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message

from moecluster.errors import Unavailable
from moecluster.expert.service import ExpertService
from moecluster.models.experts.source import ExpertSource
from moecluster.proto import checkpoint_pb2, controller_pb2, expert_pb2, router_pb2, tensor_pb2
from moecluster.rpc.checkpoint.server import Announcements, CheckpointServicer
from moecluster.rpc.controller.server import ControllerServicer
from moecluster.rpc.expert.messages import encode_batch
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.rpc.expert.server import ExpertServicer
from moecluster.rpc.router.server import RouterServicer
from moecluster.rpc.status_codes import FAULT
from moecluster.rpc.tensors import encode_tensor
from moecluster.types import ActorAddress, ExpertId
from tests.support.clusters.given import any_directory
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.expert.batches import make_batch
from tests.support.fuzz.bytes_as_choices import Choices
from tests.support.fuzz.messages import message_of
from tests.support.fuzz.run import Target

SERVICES = (checkpoint_pb2, controller_pb2, expert_pb2, router_pb2)
MAX_ACTORS = 8  # of the cluster, which a request may scale
MAX_REPLIES = 3  # read of a stream; then the client leaves
MAX_REQUESTS = 4  # on one stream
UNEXPLAINED = "the router cannot compute this request"  # for an exception that nobody expected
ALLOWED = frozenset(grpc.StatusCode) - {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


class Aborted(Exception):
    """The call ended with a status."""


class Call:
    """What a server sees of one call, with gRPC's checks of what it is given to send."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []
        self._fails_request = False

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        # Rows that are NaN, or become it, fail their request with a reason. Any other INTERNAL is a bug.
        explained = self._fails_request and UNEXPLAINED not in details
        assert code in ALLOWED or explained, f"{code.name}: {details}"
        details.encode()
        raise Aborted(code)

    def set_trailing_metadata(self, metadata: Iterable[tuple[str, str]]) -> None:
        for key, value in metadata:
            assert key.isascii() and key == key.lower() and value.isascii() and value.isprintable(), (key, value)
            self._fails_request |= (key, value) == (FAULT, "request")

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self._callbacks.append(callback)
        return True

    def is_active(self) -> bool:
        return True

    def end(self) -> None:
        for callback in self._callbacks:
            callback()


@contextmanager
def service_targets(cluster: LoopbackCluster, checkpoint: str) -> Iterator[Mapping[str, Target]]:
    """Context: the targets by Service/Method: every method that the generated modules declare.

    The expert actor is not one of the cluster's, which the router needs, and copies from no peer: a request may name
    any address, and no test calls others than its own.
    """
    experts = tuple(
        ExpertId(layer=layer.layer, index=index)
        for layer in ExpertSource(checkpoint).layers
        for index in range(layer.num_experts)
    )
    with closing(ExpertService(name="expert-0", is_given=any_directory, connect_peer=_no_peer)) as service:
        service.load(LoadRequest(term=1, experts=experts, checkpoint=checkpoint))
        yield _targets(service, cluster, checkpoint)


def _no_peer(peer: ActorAddress) -> NoReturn:
    raise Unavailable(f"{peer.address}: nobody is called")


def _targets(service: ExpertService, cluster: LoopbackCluster, checkpoint: str) -> Mapping[str, Target]:
    announced = Announcements()
    files = announced.add("model", checkpoint)
    servicers: dict[str, Any] = {
        "ExpertService": ExpertServicer(service),
        "ControllerService": ControllerServicer(cluster.controller),
        "RouterService": RouterServicer(cluster.router),
        "CheckpointService": CheckpointServicer(announced),
    }
    good = _good(files.id, next(iter(files.sizes)), checkpoint)
    found: dict[str, Target] = {}
    for module in SERVICES:
        for declared in module.DESCRIPTOR.services_by_name.values():
            for method in declared.methods:
                kind: Any = getattr(module, method.input_type.name)
                known = [message for message in good if isinstance(message, kind)]
                call = getattr(servicers[declared.name], method.name)
                found[f"{declared.name}/{method.name}"] = _target(call, kind, known, method.client_streaming)
    return found


def _target(call: Any, kind: type[Message], good: list[Message], streamed: bool) -> Target:
    def target(data: bytes) -> None:
        choices = Choices(data)
        requests = [message_of(choices.take(100), kind, good) for _ in range(1 + choices.number(MAX_REQUESTS))]
        sent = [request for request in requests if request is not None]
        if not sent:
            return
        context = Call()
        try:
            answer = call(iter(sent) if streamed else sent[0], context)
            for reply in [answer] if isinstance(answer, Message) else _first_of(answer):
                reply.SerializeToString()
        except Aborted:
            pass
        finally:
            context.end()

    return target


def _first_of(replies: Iterator[Message]) -> list[Message]:
    try:
        return [reply for reply, _ in zip(replies, range(MAX_REPLIES), strict=False)]
    finally:
        replies.close()  # type: ignore[attr-defined]  # as gRPC does when the client has left


def _good(files_id: str, file: str, checkpoint: str) -> list[Message]:
    """Requests that the services take."""
    batch = make_batch({0: [0, 1], 1: [1]}, rows=2, width=32)  # of the first layer, as the tiny model has it
    expert = tensor_pb2.ExpertRef(layer=0, index=0)
    step = expert_pb2.StepTag(term=1, step=1)
    return [
        checkpoint_pb2.CheckpointFilesRequest(id=files_id),
        checkpoint_pb2.CheckpointReadRequest(id=files_id, name=file, begin=8, num_bytes=16),
        expert_pb2.ComputeRequest(hello=expert_pb2.Hello(router="router")),
        expert_pb2.ComputeRequest(batch=encode_batch(batch)),
        expert_pb2.LoadRequest(term=1, experts=[expert], checkpoint=checkpoint, timeout_s=5.0),
        expert_pb2.UnloadRequest(term=1, experts=[tensor_pb2.ExpertRef(layer=1, index=3)]),
        expert_pb2.SetPlacementRequest(term=1, generation=1, checkpoint=checkpoint),
        expert_pb2.ExportRequest(experts=[expert]),
        expert_pb2.ReduceRequest(step=step),
        expert_pb2.PrepareRequest(step=step, clip_scale=1.0, learning_rate=0.1),
        expert_pb2.CommitRequest(step=step),
        expert_pb2.AbortRequest(step=step),
        controller_pb2.WatchRequest(router="router", applied_term=1, state=controller_pb2.RouterState(router="router")),
        controller_pb2.FailureReport(reporter="router", actor="expert-1", incarnation="x", reason="gone"),
        controller_pb2.LoadReport(router="router", loads=[controller_pb2.ExpertLoad(expert=expert, assignments=5)]),
        controller_pb2.SetCheckpointRequest(checkpoint=checkpoint),
        controller_pb2.WantRequest(router="router", experts=[expert]),
        controller_pb2.DrainRequest(node="node-of-expert-9"),
        controller_pb2.PlaceRequest(expert=expert, actors=["expert-0"]),
        controller_pb2.PlanRequest(policy="share"),
        controller_pb2.GetOperationRequest(id="x"),
        controller_pb2.ListOperationsRequest(limit=5),
        router_pb2.GenerateRequest(request_id="r", prompt="x", max_new_tokens=2),
        router_pb2.CancelRequest(request_id="r"),
        router_pb2.MoeRequest(layer=0, x=encode_tensor(batch.x_ND), timeout_s=5.0),
    ]
