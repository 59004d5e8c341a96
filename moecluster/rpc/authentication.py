"""The cluster secret on the wire: channels add it to every call, servers check it before anything else."""

import hmac
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import grpc
import grpc.aio

from moecluster.rpc.credentials import ClusterCredentials

HEALTH_PREFIX = "/grpc.health.v1.Health/"
AUTHORIZATION = "authorization"
MAX_ANONYMOUS_CALLS = 16  # concurrent health calls without the secret, so that these cannot occupy all threads
WANTED = (
    'send the metadata "authorization: Bearer SECRET" with the secret of this cluster, which moecluster up wrote to '
    "NAME.secret in its state folder (a client takes secret_file=, or $MOECLUSTER_SECRET_FILE)"
)
Details = grpc.HandlerCallDetails
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in its stub alone


class RequireSecret(grpc.ServerInterceptor):
    """Refuses calls without the secret before reading a byte of the body. Health calls need no secret."""

    def __init__(self, credentials: ClusterCredentials) -> None:
        self._wanted = credentials.metadata[0][1].encode()
        self._anonymous = threading.BoundedSemaphore(MAX_ANONYMOUS_CALLS)

    def intercept_service(
        self, continuation: "Callable[[Details], Handler | None]", handler_call_details: Details
    ) -> "Handler | None":
        problem = self._problem(handler_call_details)
        if not problem:
            return continuation(handler_call_details)
        if not handler_call_details.method.startswith(HEALTH_PREFIX):
            return _refusal(f"{problem}; {WANTED}")
        found = continuation(handler_call_details)
        return None if found is None else _bounded(found, self._anonymous)

    def _problem(self, details: Details) -> str:
        """The problem with the call's metadata; empty if it has the secret."""
        metadata: Any = details.invocation_metadata or ()  # pairs, despite the type stub
        given = [value for key, value in metadata if key == AUTHORIZATION]
        if not given:
            return "authorization: missing"
        if len(given) > 1:
            return "authorization: given more than once"
        sent = given[0] if isinstance(given[0], bytes) else given[0].encode(errors="replace")
        if hmac.compare_digest(sent, self._wanted):
            return ""
        return "authorization: the wrong secret" if sent.startswith(b"Bearer ") else "authorization: no Bearer"


def _refusal(message: str) -> Handler:
    def refuse(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, message)
        raise AssertionError("abort raises")

    # A streaming handler does not wait for the first request; the caller cannot tell the kinds of call apart.
    return grpc.stream_unary_rpc_method_handler(refuse)


def _bounded(handler: Handler, room: threading.BoundedSemaphore) -> Handler:
    """Wraps a handler of a single request, limiting how many concurrent callers may occupy a server thread."""

    def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        if not room.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls without the cluster secret at once")
        try:
            for request in requests:
                decoded = handler.request_deserializer(request) if handler.request_deserializer else request
                call: Any = handler.unary_stream or handler.unary_unary
                replies = call(decoded, context) if handler.response_streaming else [call(decoded, context)]
                for reply in replies:
                    yield handler.response_serializer(reply) if handler.response_serializer else reply
                return
        finally:
            room.release()

    return grpc.stream_stream_rpc_method_handler(answer)


class _WithSecret:
    """Adds the secret to a channel's four kinds of call. Not a gRPC interceptor, because that returns other call
    objects, which raise and end at other times."""

    def __init__(self, channel: Any, credentials: ClusterCredentials) -> None:
        self._channel = channel
        self._metadata = credentials.metadata

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _WithMetadata(self._channel.unary_unary(*args, **kwargs), self._metadata)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _WithMetadata(self._channel.unary_stream(*args, **kwargs), self._metadata)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _WithMetadata(self._channel.stream_unary(*args, **kwargs), self._metadata)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _WithMetadata(self._channel.stream_stream(*args, **kwargs), self._metadata)


class AuthenticatedChannel(_WithSecret, grpc.Channel):
    """Wraps a channel, sending the secret with every call."""

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        self._channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "AuthenticatedChannel":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class AuthenticatedAsyncChannel(_WithSecret, grpc.aio.Channel):
    """The same for an event loop."""

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        state: grpc.ChannelConnectivity = self._channel.get_state(try_to_connect)
        return state

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    async def __aenter__(self) -> "AuthenticatedAsyncChannel":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()


class _WithMetadata:
    """One method of a channel, with gRPC's interface: direct call, with_call, or future."""

    def __init__(self, method: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._method = method
        self._metadata = metadata

    def __call__(self, *args: Any, metadata: Any = None, **kwargs: Any) -> Any:
        return self._method(*args, metadata=self._with(metadata), **kwargs)

    def with_call(self, *args: Any, metadata: Any = None, **kwargs: Any) -> Any:
        return self._method.with_call(*args, metadata=self._with(metadata), **kwargs)

    def future(self, *args: Any, metadata: Any = None, **kwargs: Any) -> Any:
        return self._method.future(*args, metadata=self._with(metadata), **kwargs)

    def _with(self, metadata: Any) -> Any:
        return (*(metadata or ()), *self._metadata)
