"""gRPC over mutual TLS: both sides show a certificate of the cluster's CA, and follow changes of their files.

A server takes the newest certificate for every connection that it accepts. A channel's certificate is fixed, so a new
one is opened when the files have changed: new calls go there, and running ones end where they began.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Literal, cast

import grpc
import grpc.aio

from moecluster.rpc.tls.material import FollowedMaterial, TlsMaterial

CLOSED = "the channel is closed"

Kind = Literal["unary_unary", "unary_stream", "stream_unary", "stream_stream"]


def server_credentials(followed: FollowedMaterial) -> grpc.ServerCredentials:
    """Returns credentials for a server that requires a certificate of the same CA from every client."""
    used = followed.current()

    def newest() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        material = followed.current()
        if material is used:
            return None
        used = material
        return _configuration(material)

    # The stubs do not know that the callback may answer None: nothing new.
    fetch = cast(Callable[[], grpc.ServerCertificateConfiguration], newest)
    return grpc.dynamic_ssl_server_credentials(_configuration(used), fetch, require_client_authentication=True)


def channel_credentials(material: TlsMaterial) -> grpc.ChannelCredentials:
    """Returns credentials for one channel."""
    return grpc.ssl_channel_credentials(
        root_certificates=material.ca, private_key=material.key, certificate_chain=material.certificate
    )


def _configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.certificate)], root_certificates=material.ca
    )


class _Connection:
    """One channel with one certificate, and how many calls run on it."""

    def __init__(self, material: TlsMaterial, channel: Any) -> None:
        self.material = material
        self.channel = channel
        self.calls = 0


class _Rotating:
    """What the channels for threads and for an event loop share: the newest connection, and older ones with calls."""

    def __init__(self, followed: FollowedMaterial, connect: Callable[[TlsMaterial], Any]) -> None:
        """connect: opens a channel."""
        self._followed = followed
        self._connect = connect
        self._lock = threading.Lock()
        self._newest = self._open(followed.current())
        self._older: list[_Connection] = []
        self._closed = False

    def enter(self) -> _Connection:
        """Returns the connection for a new call, which must `leave` it. Raises ValueError once closed, as gRPC does."""
        with self._lock:
            if self._closed:
                raise ValueError(CLOSED)
            material, last = self._followed.current(), self._newest
            if material is not last.material:
                self._newest = self._open(material)
                if last.calls:
                    self._older.append(last)
                else:
                    self._drop(last)
            self._newest.calls += 1
            return self._newest

    def leave(self, connection: _Connection) -> None:
        """A call has ended. The last one on an older connection closes it."""
        with self._lock:
            connection.calls -= 1
            if not connection.calls and connection in self._older:
                self._older.remove(connection)
                self._drop(connection)

    def _open(self, material: TlsMaterial) -> _Connection:
        return _Connection(material, self._connect(material))

    def _all(self) -> list[_Connection]:
        """Closes for new calls; returns every connection."""
        with self._lock:
            self._closed = True
            return [self._newest, *self._older]

    def _drop(self, connection: _Connection) -> None:
        """Closes a connection without calls."""
        raise NotImplementedError

    def _ended(self, call: Any, then: Callable[[], None]) -> None:
        """Calls `then` once, when a call that was started has ended."""
        raise NotImplementedError

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _RotatingMethod(self, "unary_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _RotatingMethod(self, "unary_stream", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _RotatingMethod(self, "stream_unary", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _RotatingMethod(self, "stream_stream", args, kwargs)


class _RotatingMethod:
    """One method, with gRPC's interface: each call takes the newest connection."""

    def __init__(self, rotating: _Rotating, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._rotating = rotating
        self._kind = kind
        self._args, self._kwargs = args, kwargs
        self._bound: tuple[_Connection, Any] | None = None  # of the last call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._start("__call__", args, kwargs)

    def with_call(self, *args: Any, **kwargs: Any) -> Any:
        return self._start("with_call", args, kwargs)

    def future(self, *args: Any, **kwargs: Any) -> Any:
        return self._start("future", args, kwargs)

    def _start(self, way: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        connection = self._rotating.enter()
        try:
            begun = getattr(self._method(connection), way)(*args, **kwargs)
        except BaseException:
            self._rotating.leave(connection)
            raise
        if isinstance(begun, grpc.RpcContext | grpc.aio.RpcContext):
            self._rotating._ended(begun, lambda: self._rotating.leave(connection))
        else:  # a call that was waited for
            self._rotating.leave(connection)
        return begun

    def _method(self, connection: _Connection) -> Any:
        bound = self._bound
        if bound is None or bound[0] is not connection:
            bound = connection, getattr(connection.channel, self._kind)(*self._args, **self._kwargs)
            self._bound = bound
        return bound[1]


class RotatingChannel(_Rotating, grpc.Channel):
    """A channel over mutual TLS."""

    def __init__(self, followed: FollowedMaterial, connect: Callable[[TlsMaterial], grpc.Channel]) -> None:
        super().__init__(followed, connect)
        self._watched: dict[Callable[[grpc.ChannelConnectivity], None], _Connection] = {}

    def subscribe(self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool = False) -> None:
        """Tells of the newest connection, which stays open until `unsubscribe`."""
        connection = self._watched[callback] = self.enter()
        connection.channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        connection = self._watched.pop(callback, None)
        if connection is not None:
            connection.channel.unsubscribe(callback)
            self.leave(connection)

    def close(self) -> None:
        for connection in self._all():
            connection.channel.close()

    def __enter__(self) -> "RotatingChannel":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _drop(self, connection: _Connection) -> None:
        # gRPC's own thread, which tells of a call's end, must not wait for its channel's.
        threading.Thread(target=connection.channel.close, name="close-channel", daemon=True).start()

    def _ended(self, call: grpc.RpcContext, then: Callable[[], None]) -> None:
        if not call.add_callback(then):
            then()


class RotatingAsyncChannel(_Rotating, grpc.aio.Channel):
    """The same for an event loop, which must be running."""

    def __init__(self, followed: FollowedMaterial, connect: Callable[[TlsMaterial], grpc.aio.Channel]) -> None:
        super().__init__(followed, connect)
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self, grace: float | None = None) -> None:
        await asyncio.gather(*(connection.channel.close(grace) for connection in self._all()), *self._closing)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        state: grpc.ChannelConnectivity = self._newest.channel.get_state(try_to_connect)
        return state

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._newest.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._newest.channel.channel_ready()

    async def __aenter__(self) -> "RotatingAsyncChannel":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    def _drop(self, connection: _Connection) -> None:
        task = asyncio.get_running_loop().create_task(connection.channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _ended(self, call: Any, then: Callable[[], None]) -> None:
        call.add_done_callback(lambda _: then())
