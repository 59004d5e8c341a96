"""ControllerService at the server's edge: placements out, leases, failure reports and the new checkpoint in."""

import threading
from collections.abc import Iterator
from typing import Protocol

import grpc

from moecluster.errors import InvalidMessage, MoeClusterError
from moecluster.proto import controller_pb2, controller_pb2_grpc
from moecluster.rpc.controller_messages import (
    MAX_REASON_LENGTH,
    checked_name,
    checked_path,
    decode_load,
    encode_placement,
    encode_status,
)
from moecluster.rpc.interfaces import PlacementSource
from moecluster.rpc.placement_board import NEVER
from moecluster.rpc.server import MAX_CALLS, RunningServer, start_server
from moecluster.rpc.status_codes import abort_with
from moecluster.types import ControllerStatus, LoadSnapshot

WAIT_S = 1.0  # between looks at whether a subscriber is still there


class ControllerHandler(PlacementSource, Protocol):
    """What stands behind the service."""

    lease_s: float

    def renew_lease(self, router: str, applied: tuple[int, int]) -> None:
        """A router is there, and has applied this placement."""

    def report_load(self, router: str, load: LoadSnapshot) -> None:
        """What a router counted in its last window."""

    def set_checkpoint(self, checkpoint: str) -> None:
        """Lost experts are loaded from this directory from now on."""

    def status(self) -> ControllerStatus:
        """The cluster as the controller sees it."""


class ControllerServicer(controller_pb2_grpc.ControllerServiceServicer):
    """Translates messages to calls of the handler, and its errors to status codes."""

    def __init__(self, handler: ControllerHandler) -> None:
        self._handler = handler

    def WatchPlacement(
        self, request_iterator: Iterator[controller_pb2.WatchRequest], context: grpc.ServicerContext
    ) -> Iterator[controller_pb2.Placement]:
        subscription = _Subscription(self._handler, request_iterator)
        threading.Thread(target=subscription.read, name="watch-placement", daemon=True).start()
        sent = NEVER
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
        try:
            checked_name(request.reporter, "reporter")
            self._handler.report_failure(
                checked_name(request.actor, "actor"), request.incarnation, request.reason[:MAX_REASON_LENGTH]
            )
        except MoeClusterError as exc:
            abort_with(context, exc)
        return controller_pb2.FailureReply()

    def ReportLoad(
        self, request: controller_pb2.LoadReport, context: grpc.ServicerContext
    ) -> controller_pb2.LoadReportReply:
        try:
            self._handler.report_load(checked_name(request.router, "router"), decode_load(request))
        except MoeClusterError as exc:
            abort_with(context, exc)
        return controller_pb2.LoadReportReply()

    def SetCheckpoint(
        self, request: controller_pb2.SetCheckpointRequest, context: grpc.ServicerContext
    ) -> controller_pb2.SetCheckpointReply:
        try:
            self._handler.set_checkpoint(checked_path(request.checkpoint, "checkpoint"))
        except MoeClusterError as exc:
            abort_with(context, exc)
        return controller_pb2.SetCheckpointReply()

    def Status(
        self, request: controller_pb2.ControllerStatusRequest, context: grpc.ServicerContext
    ) -> controller_pb2.ControllerStatus:
        return encode_status(self._handler.status())


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
                self._handler.renew_lease(router, (request.applied_term, request.applied_generation))
        except InvalidMessage as exc:
            self.error = exc
        except grpc.RpcError:
            pass  # the router is gone; its lease runs out by itself
        finally:
            self.ended.set()


def serve_controller(
    handler: ControllerHandler,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    credentials: grpc.ServerCredentials | None = None,
    max_calls: int = MAX_CALLS,
) -> RunningServer:
    """Serves a controller. Raises ResourceError if the port is in use."""

    def add_services(server: grpc.Server) -> list[str]:
        controller_pb2_grpc.add_ControllerServiceServicer_to_server(ControllerServicer(handler), server)
        return [controller_pb2.DESCRIPTOR.services_by_name["ControllerService"].full_name]

    return start_server(add_services, host=host, port=port, credentials=credentials, max_calls=max_calls)
