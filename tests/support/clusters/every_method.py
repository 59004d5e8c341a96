"""All gRPC methods of a cluster's servers, found through descriptors, and a generic call of any of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from moecluster.proto import checkpoint_pb2, controller_pb2, expert_pb2, router_pb2

OURS = (checkpoint_pb2, controller_pb2, expert_pb2, router_pb2)
CALL_TIMEOUT_S = 60.0
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of a service."""

    path: str  # /package.Service/Method
    requests_streamed: bool


def methods_of(*modules: Any) -> Iterator[Method]:
    """Yields all methods of all services that generated modules declare."""
    for module in modules:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield Method(path=f"/{service.full_name}/{method.name}", requests_streamed=method.client_streaming)


def guarded_methods() -> list[Method]:
    """Returns the methods that require the secret: those of every service except health."""
    return [*methods_of(*OURS), *methods_of(reflection_pb2)]


def health_methods() -> list[Method]:
    return list(methods_of(health_pb2))


def code_of(
    channel: grpc.Channel, method: Method, metadata: Metadata = (), *, connects: bool = False
) -> tuple[grpc.StatusCode, str]:
    """Returns (status, detail) of a call with an empty request; OK if a reply arrives. connects: waits for a
    connection, which takes its time on a busy machine."""
    open_call: Any = channel.stream_stream(method.path)  # all kinds of call look alike on the wire
    call: Any = open_call(iter([b""]), timeout=CALL_TIMEOUT_S, metadata=tuple(metadata), wait_for_ready=connects)
    try:
        next(call, None)
    except grpc.RpcError as exc:
        return exc.code(), exc.details() or ""
    call.cancel()
    return grpc.StatusCode.OK, ""
