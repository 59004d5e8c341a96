"""Channels that send a cluster's secret or token with every call, and the wait for a channel's connection."""

import threading
from typing import Any

import grpc
import grpc.aio

from moecluster.rpc.credentials import ClusterCredentials


def is_connected_within(channel: grpc.Channel, timeout_s: float) -> bool:
    """Waits for a channel's connection; returns False if none comes about in time."""
    connected = threading.Event()
    ready = grpc.channel_ready_future(channel)  # its own wait follows the wall clock, which may be set meanwhile
    ready.add_done_callback(lambda _: connected.set())
    try:
        return connected.wait(timeout_s)
    finally:
        ready.cancel()


class _WithCredentials:
    """Adds the credentials to a channel's four kinds of call. Not a gRPC interceptor, because that returns other call
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


class AuthenticatedChannel(_WithCredentials, grpc.Channel):
    """Wraps a channel, sending the credentials with every call."""

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


class AuthenticatedAsyncChannel(_WithCredentials, grpc.aio.Channel):
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
