"""Detects at once that a server is gone, by a Watch stream to its standard health service."""

import threading
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.server import open_channel


class HealthWatch:
    """Calls on_lost once, from its own thread, when the stream breaks or the server stops serving."""

    def __init__(
        self, address: str, on_lost: Callable[[], None], *, credentials: ClusterCredentials | None = None
    ) -> None:
        self._on_lost = on_lost
        self._closed = threading.Event()
        self._channel = open_channel(address, credentials)
        self._stub: Any = health_pb2_grpc.HealthStub(self._channel)  # its type stubs lack Watch
        threading.Thread(target=self._watch, name="health-watch", daemon=True).start()

    def close(self) -> None:
        """Ends the watch; on_lost is not called any more."""
        self._closed.set()
        self._channel.close()

    def _watch(self) -> None:
        try:
            for reply in self._stub.Watch(health_pb2.HealthCheckRequest()):
                if reply.status != health_pb2.HealthCheckResponse.SERVING:
                    break
        except (grpc.RpcError, ValueError):  # broken, or closed before it began
            pass
        if not self._closed.is_set():
            self._on_lost()
