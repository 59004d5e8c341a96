"""A gRPC server of each kind, with handlers that have nothing to say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moecluster.rpc.checkpoint.server import Announcements, serve_checkpoints
from moecluster.rpc.controller.server import serve_controller
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert.server import serve_expert
from moecluster.rpc.router.server import serve_router
from moecluster.rpc.server import RunningServer


class Untouched:
    """A handler that fails whoever reaches it."""

    lease_s = 1.0
    incarnation = "incarnation"

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


@contextmanager
def guarded_servers(credentials: ClusterCredentials) -> Iterator[dict[str, RunningServer]]:
    """Context: kind -> its server, which requires these credentials. Only refused calls never reach the handler."""
    nothing: Any = Untouched()
    servers = {
        "expert": serve_expert(nothing, credentials=credentials),
        "router": serve_router(nothing, credentials=credentials),
        "controller": serve_controller(nothing, credentials=credentials),
        "checkpoint": serve_checkpoints(Announcements(), credentials=credentials),
    }
    try:
        yield servers
    finally:
        for server in servers.values():
            server.stop(0.0)
