"""Limits the number of connections, and times out those that are idle, send headers slowly, or do not read."""

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from moecluster.gateway.api_errors import ApiError
from moecluster.gateway.crowd import Crowd, Place, party_of_address
from moecluster.gateway.own_user import is_own_user

MAX_HEAD_BYTES = 64 * 1024  # headers of one request, and the framing of its chunked body
FRAMING = 8  # bytes on the wire per body byte, if each is a chunk of its own
OWN_USER = "moecluster.own_user"  # key in a request's scope: tells whether this process's user sent it, on this host
MAX_PIPELINED = 16  # requests queued behind the current one


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Maximum number of connections, and their timeouts."""

    max_connections: int
    idle_s: float  # between requests, and before the first
    head_timeout_s: float  # from a request's first byte to the end of its headers
    send_timeout_s: float  # for a client that reads nothing of its response


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's connection with timeouts and size limits. See guarded_protocol."""

    limits: ConnectionLimits
    waiting: Crowd  # connections that wait for a request

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._place: Place | None = None  # while it waits for a request
        self._timer: asyncio.TimerHandle | None = None  # of that wait
        self._unread: asyncio.TimerHandle | None = None  # while the client does not read
        self._begun = False  # a part of the awaited request has arrived
        self._in_head = False
        self._message_bytes = 0  # not counting the read in which the message began
        self._body_bytes = 0
        self._is_own_user: bool | None = None  # None: not asked yet

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """If there are too many connections, ends a waiting one, or this one if none waits."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections and self.waiting.end_one() is None:
            transport.abort()
            return
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the timers."""
        self._end_wait()
        self._unread = _cancel(self._unread)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser. Refuses headers that are too large."""
        if self._timer is not None and not self._begun:
            self._begun = True  # the timeout is not extended again, however slowly the rest arrives
            self._rearm(self.limits.head_timeout_s)
        self._message_bytes += len(data)
        super().data_received(data)
        if self._message_bytes > MAX_HEAD_BYTES + FRAMING * self._body_bytes and not self.transport.is_closing():
            self._refuse(ApiError(431, f"the headers are larger than {MAX_HEAD_BYTES} bytes", code="headers_too_large"))

    def on_message_begin(self) -> None:
        """Raises ValueError if too many requests are pipelined; uvicorn then answers 400."""
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests are pipelined")
        self._in_head = True
        self._message_bytes = self._body_bytes = 0
        super().on_message_begin()
        self.scope[OWN_USER] = self.is_own_user  # type: ignore[literal-required]  # a key of our own

    def on_header(self, name: bytes, value: bytes) -> None:
        """Drops trailers: nothing reads them."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request has arrived: ends the wait for it."""
        self._in_head = False
        self._end_wait()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Counts the body's bytes."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_response_complete(self) -> None:
        """Waits for the next request, unless it is already pipelined."""
        is_last = not self.pipeline
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_unread()
        elif is_last:
            self._wait()

    def pause_writing(self) -> None:
        """The client reads too slowly: starts its timeout."""
        super().pause_writing()
        self._abort_unread()

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        if not self.transport.is_closing():  # otherwise the rest must be read within the same timeout
            self._unread = _cancel(self._unread)

    def timeout_keep_alive_handler(self) -> None:
        """uvicorn's keep-alive timeout; ours may fire earlier."""
        self._expire()

    def is_own_user(self) -> bool:
        """Whether this process's user opened the connection, on this host."""
        if self._is_own_user is None:
            self._is_own_user = is_own_user(_numeric(self.client), _numeric(self.server))
        return self._is_own_user

    def _wait(self) -> None:
        self._begun = self._in_head
        self._rearm(self.limits.head_timeout_s if self._begun else self.limits.idle_s)
        host = self.client[0] if self.client else ""
        self._place = Place(parties=(party_of_address(host),), end=self._expire)
        self.waiting.enter(self._place)

    def _rearm(self, after_s: float) -> None:
        _cancel(self._timer)
        self._timer = self.loop.call_later(after_s, self._expire)

    def _end_wait(self) -> None:
        self._timer = _cancel(self._timer)
        if self._place is not None:
            self.waiting.leave(self._place)
            self._place = None

    def _expire(self) -> None:
        """Ends the connection: its wait timed out, or another connection needs its room."""
        self._end_wait()
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # the client has not read its last response
        elif self._in_head:
            self._refuse(ApiError(408, "the headers did not arrive in time"))
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, api_error: ApiError) -> None:
        self._end_wait()
        response = api_error.response()
        lines = [STATUS_LINE[api_error.status], b"connection: close\r\n"]
        lines += [b"%s: %s\r\n" % header for header in response.raw_headers]
        self.transport.write(b"".join([*lines, b"\r\n", bytes(response.body)]))
        self.transport.close()
        self._abort_unread()

    def _abort_unread(self) -> None:
        """Aborts the connection once its client reads nothing for send_timeout_s: a graceful close waits for it."""
        self._unread = _cancel(self._unread)
        if self.transport.get_write_buffer_size():
            self._unread = self.loop.call_later(self.limits.send_timeout_s, self.transport.abort)


def guarded_protocol(limits_: ConnectionLimits) -> type[GuardedProtocol]:
    """Returns the protocol class for the connections of one server."""

    class Guarded(GuardedProtocol):
        limits = limits_
        waiting = Crowd()

    return Guarded


def _numeric(end: tuple[str, int | None] | tuple[str, int] | None) -> tuple[str, int] | None:
    return (end[0], end[1]) if end is not None and end[1] is not None else None


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancels a timer; returns None, to assign in its place."""
    if timer is not None:
        timer.cancel()
    return None
