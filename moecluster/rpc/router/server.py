"""Server of RouterService: streamed generation, single MoE layers, status."""

import logging
import math
from collections.abc import Iterator
from functools import partial

import grpc
import torch

from moecluster.addresses import ListenAddress
from moecluster.errors import MoeClusterError, RequestFailed, UserError
from moecluster.proto import router_pb2, router_pb2_grpc
from moecluster.rpc import tensors
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.fields import checked_amount, checked_name, checked_path
from moecluster.rpc.router.interface import RouterHandler, TrainingHandler
from moecluster.rpc.router.messages import decode_generation_request, encode_chunk, encode_router_status
from moecluster.rpc.router.training_messages import decode_start, encode_progress
from moecluster.rpc.server import LOOPBACK, MAX_CALLS, RunningServer, start_server
from moecluster.rpc.status_codes import abort_with, answer

logger = logging.getLogger(__name__)
SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Translates messages into calls of the handler, and its errors into status codes."""

    def __init__(self, handler: RouterHandler, training: TrainingHandler | None = None) -> None:
        """training: None if this router trains nothing."""
        self._handler = handler
        self._training_or_none = training

    def Generate(
        self, request: router_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[router_pb2.GenerateReply]:
        try:
            decoded = decode_generation_request(request)
            chunks = self._handler.generate(decoded)

            def leave() -> None:  # the client disconnected: the iterator would notice only at its next token
                self._handler.cancel(decoded.request_id)

            context.add_callback(leave)
            for chunk in chunks:
                yield encode_chunk(chunk)
        except MoeClusterError as exc:
            abort_with(context, exc)
        except Exception as exc:  # from a tokenizer or torch: it would fail at another router too
            logger.exception("the request %s failed", request.request_id)
            abort_with(context, RequestFailed(f"the router cannot compute this request: {exc!r}"))

    def Cancel(self, request: router_pb2.CancelRequest, context: grpc.ServicerContext) -> router_pb2.CancelReply:
        try:
            return router_pb2.CancelReply(found=self._handler.cancel(checked_name(request.request_id, "request_id")))
        except MoeClusterError as exc:
            abort_with(context, exc)

    def Moe(self, request: router_pb2.MoeRequest, context: grpc.ServicerContext) -> router_pb2.MoeReply:
        try:
            x_TD = tensors.decode_tensor(request.x, "x", dtypes=tensors.ROW_DTYPES, shape=(None, None))
            timeout_s = checked_amount(request.timeout_s, "timeout_s") or math.inf
            y_TD, ids_TK, weights_TK = self._handler.moe(request.layer, x_TD, timeout_s)
            return router_pb2.MoeReply(
                y=tensors.encode_tensor(y_TD.cpu()),
                ids=tensors.encode_tensor(ids_TK.cpu().to(torch.int64)),
                weights=tensors.encode_tensor(weights_TK.cpu().to(torch.float32)),
            )
        except MoeClusterError as exc:
            abort_with(context, exc)

    def Status(self, request: router_pb2.RouterStatusRequest, context: grpc.ServicerContext) -> router_pb2.RouterStatus:
        return encode_router_status(self._handler.status())

    def Reload(self, request: router_pb2.ReloadRequest, context: grpc.ServicerContext) -> router_pb2.ReloadReply:
        def reload() -> router_pb2.ReloadReply:
            self._handler.reload(checked_path(request.checkpoint, "checkpoint"))
            return router_pb2.ReloadReply()

        return answer(context, reload)

    def StartTraining(
        self, request: router_pb2.StartTrainingRequest, context: grpc.ServicerContext
    ) -> router_pb2.StartTrainingReply:
        def start() -> router_pb2.StartTrainingReply:
            self._training.start(decode_start(request))
            return router_pb2.StartTrainingReply()

        return answer(context, start)

    def FollowTraining(
        self, request: router_pb2.FollowTrainingRequest, context: grpc.ServicerContext
    ) -> router_pb2.TrainingProgress:
        def follow() -> router_pb2.TrainingProgress:
            return encode_progress(self._training.progress(checked_name(request.run_id, "run_id"), request.since))

        return answer(context, follow)

    def StopTraining(
        self, request: router_pb2.StopTrainingRequest, context: grpc.ServicerContext
    ) -> router_pb2.StopTrainingReply:
        def stop() -> router_pb2.StopTrainingReply:
            self._training.stop(checked_name(request.run_id, "run_id"))
            return router_pb2.StopTrainingReply()

        return answer(context, stop)

    @property
    def _training(self) -> TrainingHandler:
        if self._training_or_none is None:
            raise UserError("this router trains nothing")
        return self._training_or_none


def serve_router(
    handler: RouterHandler,
    training: TrainingHandler | None = None,
    *,
    credentials: ClusterCredentials | None,
    listen: ListenAddress = LOOPBACK,
    max_calls: int = MAX_CALLS,
) -> RunningServer:
    """Serves a router, and training in its process if there is any. credentials as in start_server.

    Raises ResourceError if it cannot listen.
    """
    add_servicer = partial(router_pb2_grpc.add_RouterServiceServicer_to_server, RouterServicer(handler, training))
    return start_server(SERVICE, add_servicer, listen=listen, credentials=credentials, max_calls=max_calls)
