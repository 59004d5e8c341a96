"""Copying experts from another actor over gRPC: the other end of its Export."""

from collections.abc import Iterator

import grpc

from moecluster.errors import Unavailable
from moecluster.proto import expert_pb2, tensor_pb2
from moecluster.proto.expert_pb2_grpc import ExpertServiceStub
from moecluster.rpc import export_chunks
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.interfaces import ExportedTensor, Pace
from moecluster.rpc.server import open_channel
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import ActorAddress, ExpertId

CONNECT_TIMEOUT_S = 2.0  # a single attempt gives up after 0.1 s, which a busy host may need


class GrpcPeerExports:
    """PeerExports of one life of an actor."""

    def __init__(self, peer: ActorAddress, *, credentials: ClusterCredentials | None = None) -> None:
        """Connects when it is first asked."""
        self._peer = peer
        self._channel = open_channel(peer.address, credentials)
        self._stub = ExpertServiceStub(self._channel)
        self._is_connected = False

    def tensors(
        self, expert: ExpertId, *, weight_version: int = 0, max_tensor_bytes: int, timeout_s: float, pace: Pace
    ) -> Iterator[ExportedTensor]:
        request = expert_pb2.ExportRequest(
            experts=[tensor_pb2.ExpertRef(layer=expert.layer, index=expert.index)],
            incarnation=self._peer.incarnation,
            weight_version=weight_version,
        )
        try:
            if not self._is_connected:
                grpc.channel_ready_future(self._channel).result(min(CONNECT_TIMEOUT_S, timeout_s))
                self._is_connected = True
            call = self._stub.Export(request, timeout=timeout_s)
        except grpc.FutureTimeoutError as exc:
            raise Unavailable(f"{self._peer.actor}: no connection within {CONNECT_TIMEOUT_S:g} s") from exc
        except ValueError as exc:  # the channel was closed
            raise Unavailable(f"{self._peer.actor}: {exc}") from exc
        try:
            yield from export_chunks.assemble(call, max_tensor_bytes=max_tensor_bytes, pace=pace)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, self._peer.actor) from exc
        finally:
            call.cancel()  # whoever takes no more must not keep the peer sending

    def close(self) -> None:
        self._channel.close()
