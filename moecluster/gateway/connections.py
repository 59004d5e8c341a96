"""Connections that ask for nothing, never end asking, or never read: each has its time, and all of them their room."""

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from moecluster.gateway.api_errors import Refusal
from moecluster.gateway.crowd import Crowd, Place, party_of_address

MAX_HEAD_BYTES = 64 * 1024  # of one request, and of what stands around its chunks
FRAMING = 8  # bytes on the wire for a byte of a body, where each is a chunk of its own
MAX_PIPELINED = 16  # requests behind the one that is answered


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """How many there may be, and how long they may take."""

    max_connections: int
    idle_s: float  # between requests, and before the first
    head_timeout_s: float  # from a request's first byte to the end of its headers
    send_timeout_s: float  # for a client that takes in nothing of its answer


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's connection with deadlines and bounds around what it waits for. See guarded_protocol."""

    limits: ConnectionLimits
    waiting: Crowd  # connections without a request that is being answered

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._place: Place | None = None  # while it waits for a request
        self._timer: asyncio.TimerHandle | None = None  # of that wait
        self._unread: asyncio.TimerHandle | None = None  # while the client does not read
        self._begun = False  # something of the awaited request is there
        self._in_head = False
        self._message_bytes = 0  # after the read in which it began
        self._body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Makes room for it where there is none."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections and self.waiting.end_one() is None:
            transport.abort()
            return
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets it."""
        self._end_wait()
        self._unread = _cancel(self._unread)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser."""
        if self._timer is not None and not self._begun:
            self._begun = True  # from here on it counts, however slowly it goes on
            self._rearm(self.limits.head_timeout_s)
        self._message_bytes += len(data)
        super().data_received(data)
        if self._message_bytes > MAX_HEAD_BYTES + FRAMING * self._body_bytes and not self.transport.is_closing():
            self._refuse(Refusal(431, f"the headers are larger than {MAX_HEAD_BYTES} bytes", code="headers_too_large"))

    def on_message_begin(self) -> None:
        """Raises where too many requests wait behind each other: uvicorn answers 400 then."""
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests are pipelined")
        self._in_head = True
        self._message_bytes = self._body_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Passes trailers over: they would be kept for nobody."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request is there."""
        self._in_head = False
        self._end_wait()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Counts it."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_response_complete(self) -> None:
        """Waits for the next request, if it is not there yet."""
        is_last = not self.pipeline
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_unread()
        elif is_last:
            self._wait()

    def pause_writing(self) -> None:
        """The client is behind."""
        super().pause_writing()
        self._abort_unread()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if not self.transport.is_closing():  # else the rest has the same time
            self._unread = _cancel(self._unread)

    def timeout_keep_alive_handler(self) -> None:
        """uvicorn's own; ours may be earlier."""
        self._expire()

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
        """Its time is over, or others need its room."""
        self._end_wait()
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # what it was answered lies here unread
        elif self._in_head:
            self._refuse(Refusal(408, "the headers did not arrive in time"))
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, refusal: Refusal) -> None:
        self._end_wait()
        response = refusal.response()
        lines = [STATUS_LINE[refusal.status], b"connection: close\r\n"]
        lines += [b"%s: %s\r\n" % header for header in response.raw_headers]
        self.transport.write(b"".join([*lines, b"\r\n", bytes(response.body)]))
        self.transport.close()
        self._abort_unread()

    def _abort_unread(self) -> None:
        """Ends it when its client takes in nothing for too long: an end in good order waits for that client."""
        self._unread = _cancel(self._unread)
        if self.transport.get_write_buffer_size():
            self._unread = self.loop.call_later(self.limits.send_timeout_s, self.transport.abort)


def guarded_protocol(limits_: ConnectionLimits) -> type[GuardedProtocol]:
    """The class of a server's connections."""

    class Guarded(GuardedProtocol):
        limits = limits_
        waiting = Crowd()

    return Guarded


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None: there is no timer any more."""
    if timer is not None:
        timer.cancel()
    return None
