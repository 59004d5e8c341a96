"""Unit tests run in one process: a test that starts Ray, listens, or connects to another process fails.

Unix sockets stay allowed, because event loops create a pair. gRPC is blocked at its entry points, because its core
opens sockets without Python's socket module.
"""

import socket
from typing import Any, NoReturn

import grpc
import grpc.aio
import pytest
import ray

GRPC_ENTRY_POINTS = ("server", "insecure_channel", "secure_channel")
SOCKET_METHODS = ("bind", "connect", "connect_ex")


@pytest.fixture(autouse=True)
def neither_ray_nor_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(owner: Any, name: str, replacement: str) -> None:
        def forbidden(*args: Any, **kwargs: Any) -> NoReturn:
            pytest.fail(f"a unit test may not call {owner.__name__}.{name}: {replacement}")

        monkeypatch.setattr(owner, name, forbidden)

    def forbid_network(name: str) -> None:
        allowed = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX:
                pytest.fail(f"a unit test may not {name} a socket to {address}: move it to tests/rpc")
            return allowed(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)

    forbid(ray, "init", "move it to tests/cluster")
    for owner in (grpc, grpc.aio):
        for name in GRPC_ENTRY_POINTS:
            forbid(owner, name, "use the in-process transport, or move it to tests/rpc")
    for name in SOCKET_METHODS:
        forbid_network(name)
