"""The gRPC server of ControllerService: placements out; leases, reports and operation requests in."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import grpc

from moecluster.addresses import ListenAddress
from moecluster.errors import InvalidMessage, Unavailable
from moecluster.proto import controller_pb2, controller_pb2_grpc
from moecluster.rpc.controller.interface import ControllerHandler
from moecluster.rpc.controller.load_messages import decode_load, encode_cluster_loads
from moecluster.rpc.controller.operation_messages import encode_operation, encode_operations, encode_plan
from moecluster.rpc.controller.placement_messages import encode_placement
from moecluster.rpc.controller.status_messages import decode_router_state, encode_status
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.fields import (
    MAX_REASON_LENGTH,
    checked_count,
    checked_name,
    checked_names,
    checked_optional_name,
    checked_path,
    decode_expert,
    decode_experts,
)
from moecluster.rpc.server import LOOPBACK, MAX_CALLS, RunningServer, start_server
from moecluster.rpc.status_codes import abort_with, answer
from moecluster.types import NO_PLACEMENT, PlacementNumber, RouterState

WAIT_S = 1.0  # between checks that a subscriber is still connected
READY_WAIT_S = 5.0  # of a request for a controller that is starting

AnswerT = TypeVar("AnswerT")
SERVICE = controller_pb2.DESCRIPTOR.services_by_name["ControllerService"].full_name


class ControllerServicer(controller_pb2_grpc.ControllerServiceServicer):
    """Translates messages to calls of the handler, and its errors to status codes.

    Before a controller publishes its first placement it does not know what its predecessor did: calls about loads,
    plans and operations wait READY_WAIT_S for that, then fail with UNAVAILABLE.
    """

    def __init__(self, handler: ControllerHandler) -> None:
        self._handler = handler

    def WatchPlacement(
        self, request_iterator: Iterator[controller_pb2.WatchRequest], context: grpc.ServicerContext
    ) -> Iterator[controller_pb2.Placement]:
        subscription = _Subscription(self._handler, request_iterator)
        threading.Thread(target=subscription.read, name="watch-placement", daemon=True).start()
        sent = NO_PLACEMENT
        while context.is_active() and not subscription.ended.is_set():
            placement = self._handler.newer_than(sent, WAIT_S)
            if placement is not None:
                sent = placement.number
                yield encode_placement(placement, self._handler.lease_s)
        if subscription.error is not None:
            abort_with(context, subscription.error)

    def ReportFailure(
        self, request: controller_pb2.FailureReport, context: grpc.ServicerContext
    ) -> controller_pb2.FailureReply:
        def report() -> controller_pb2.FailureReply:
            checked_name(request.reporter, "reporter")
            actor = checked_name(request.actor, "actor")
            for expert in decode_experts(request.nonfinite, "nonfinite"):
                self._handler.report_nonfinite(
                    actor, request.incarnation, expert, PlacementNumber(request.placement_term, request.generation)
                )
            if not request.nonfinite:
                self._handler.report_failure(actor, request.incarnation, request.reason[:MAX_REASON_LENGTH])
            return controller_pb2.FailureReply()

        return answer(context, report)

    def ReportLoad(
        self, request: controller_pb2.LoadReport, context: grpc.ServicerContext
    ) -> controller_pb2.LoadReportReply:
        def report() -> controller_pb2.LoadReportReply:
            self._handler.report_load(checked_name(request.router, "router"), decode_load(request))
            return controller_pb2.LoadReportReply()

        return answer(context, report)

    def WantExperts(
        self, request: controller_pb2.WantRequest, context: grpc.ServicerContext
    ) -> controller_pb2.WantReply:
        def want() -> controller_pb2.WantReply:
            router = checked_name(request.router, "router")
            self._handler.want_experts(router, decode_experts(request.experts, "experts"))
            return controller_pb2.WantReply()

        return answer(context, want)

    def SetCheckpoint(
        self, request: controller_pb2.SetCheckpointRequest, context: grpc.ServicerContext
    ) -> controller_pb2.SetCheckpointReply:
        def set_checkpoint() -> controller_pb2.SetCheckpointReply:
            self._handler.set_checkpoint(checked_path(request.checkpoint, "checkpoint"))
            return controller_pb2.SetCheckpointReply()

        return answer(context, set_checkpoint)

    def Status(
        self, request: controller_pb2.ControllerStatusRequest, context: grpc.ServicerContext
    ) -> controller_pb2.ControllerStatus:
        return answer(context, lambda: encode_status(self._handler.status()))

    def Loads(self, request: controller_pb2.LoadsRequest, context: grpc.ServicerContext) -> controller_pb2.LoadsReply:
        return self._answer_when_ready(context, lambda: encode_cluster_loads(self._handler.loads()))

    def Scale(self, request: controller_pb2.ScaleRequest, context: grpc.ServicerContext) -> controller_pb2.Operation:
        def scale() -> controller_pb2.Operation:
            operation_id = _operation_id(request.operation_id)
            if not request.routers:
                expert_actors = checked_count(request.expert_actors, "expert_actors", least=1)
                return encode_operation(self._handler.scale(expert_actors, operation_id=operation_id))
            if request.expert_actors:
                raise InvalidMessage("routers", "given beside expert_actors, expected one of the two")
            routers = checked_count(request.routers, "routers", least=1)
            return encode_operation(self._handler.scale_routers(routers, operation_id=operation_id))

        return self._answer_when_ready(context, scale)

    def Drain(self, request: controller_pb2.DrainRequest, context: grpc.ServicerContext) -> controller_pb2.Operation:
        def drain() -> controller_pb2.Operation:
            node = checked_name(request.node, "node")
            return encode_operation(self._handler.drain(node, operation_id=_operation_id(request.operation_id)))

        return self._answer_when_ready(context, drain)

    def Place(self, request: controller_pb2.PlaceRequest, context: grpc.ServicerContext) -> controller_pb2.Operation:
        def place() -> controller_pb2.Operation:
            if not request.HasField("expert"):
                raise InvalidMessage("expert", "missing")
            expert = decode_expert(request.expert, "expert")
            actors = checked_names(request.actors, "actors")
            operation = self._handler.place(expert, actors, operation_id=_operation_id(request.operation_id))
            return encode_operation(operation)

        return self._answer_when_ready(context, place)

    def Update(self, request: controller_pb2.UpdateRequest, context: grpc.ServicerContext) -> controller_pb2.Operation:
        def update() -> controller_pb2.Operation:
            checkpoint = checked_path(request.checkpoint, "checkpoint")
            operation = self._handler.update(checkpoint, operation_id=_operation_id(request.operation_id))
            return encode_operation(operation)

        return self._answer_when_ready(context, update)

    def Plan(self, request: controller_pb2.PlanRequest, context: grpc.ServicerContext) -> controller_pb2.PlanReply:
        def plan() -> controller_pb2.PlanReply:
            return encode_plan(self._handler.plan(checked_optional_name(request.policy, "policy")))

        return self._answer_when_ready(context, plan)

    def GetOperation(
        self, request: controller_pb2.GetOperationRequest, context: grpc.ServicerContext
    ) -> controller_pb2.Operation:
        def get() -> controller_pb2.Operation:
            return encode_operation(self._handler.operation(checked_name(request.id, "id")))

        return self._answer_when_ready(context, get)

    def ListOperations(
        self, request: controller_pb2.ListOperationsRequest, context: grpc.ServicerContext
    ) -> controller_pb2.OperationList:
        def list_operations() -> controller_pb2.OperationList:
            return encode_operations(self._handler.operations(checked_count(request.limit, "limit")))

        return self._answer_when_ready(context, list_operations)

    def Shutdown(
        self, request: controller_pb2.ShutdownRequest, context: grpc.ServicerContext
    ) -> controller_pb2.ShutdownReply:
        def shut_down() -> controller_pb2.ShutdownReply:
            self._handler.shut_down()
            return controller_pb2.ShutdownReply()

        return answer(context, shut_down)

    def _answer_when_ready(self, context: grpc.ServicerContext, call: Callable[[], AnswerT]) -> AnswerT:
        def ready() -> AnswerT:
            if self._handler.newer_than(NO_PLACEMENT, READY_WAIT_S) is None:
                raise Unavailable("the controller is starting, and reads what its predecessor did; try again")
            return call()

        return answer(context, ready)


class _Subscription:
    """The incoming half of one router's stream: every message renews its lease."""

    def __init__(self, handler: ControllerHandler, requests: Iterator[controller_pb2.WatchRequest]) -> None:
        self._handler = handler
        self._requests = requests
        self.error: InvalidMessage | None = None
        self.ended = threading.Event()

    def read(self) -> None:
        try:
            for request in self._requests:
                router = checked_name(request.router, "router")
                applied = PlacementNumber(request.applied_term, request.applied_generation)
                self._handler.renew_lease(router, applied, hold=request.hold, state=_router_state(request, router))
        except InvalidMessage as exc:
            self.error = exc
        except grpc.RpcError:
            pass  # the router is gone; its lease expires by itself
        finally:
            self.ended.set()


def serve_controller(
    handler: ControllerHandler,
    *,
    credentials: ClusterCredentials | None,
    listen: ListenAddress = LOOPBACK,
    max_calls: int = MAX_CALLS,
) -> RunningServer:
    """Serves a controller. credentials as in start_server.

    Raises ResourceError if it cannot listen.
    """
    add_servicer = partial(controller_pb2_grpc.add_ControllerServiceServicer_to_server, ControllerServicer(handler))
    return start_server(SERVICE, add_servicer, listen=listen, credentials=credentials, max_calls=max_calls)


def _router_state(request: controller_pb2.WatchRequest, router: str) -> RouterState:
    """Returns the router's reported state; only its name if it reports none."""
    if not request.HasField("state"):
        return RouterState(router=router)
    state = decode_router_state(request.state)
    if state.router != router:
        raise InvalidMessage("state.router", f"{state.router}, and the lease is {router}'s")
    return state


def _operation_id(given: str) -> str:
    return checked_optional_name(given, "operation_id")
