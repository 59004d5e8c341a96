"""Middleware for every request: checks caller, rate, body size and admission; ends it if its client disconnects."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from moecluster.config.sections import ServeConfig
from moecluster.gateway.access import Access
from moecluster.gateway.admission import Admission
from moecluster.gateway.api_errors import ApiError
from moecluster.gateway.connections import OWN_USER
from moecluster.gateway.crowd import Place, party_of_address
from moecluster.gateway.metrics import GatewayMetrics
from moecluster.gateway.rates import RequestRates

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

PROTECTED = "/v1/"
METRICS = "/metrics"
CLUSTERS = "moecluster.clusters"  # key in a request's scope: whose models its caller may use; None: all
# A proxy hands on requests of others, though it may run as the gateway's user.
PROXY_HEADERS = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")
SERVED = "moecluster.model"  # key in a request's scope: the name of its served model
ROUTES = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/openapi.json"})
CLIENT_LEFT = 499
DRAINED_BODIES = 8  # read up to this many times max_body_bytes of a body that is too large
MAX_DIGITS = 18  # of a Content-Length
CLOSE = {"Connection": "close"}


class GatewayMiddleware:
    """ASGI middleware around the routes."""

    def __init__(
        self, app: App, *, access: Access, admission: Admission, settings: ServeConfig, metrics: GatewayMetrics
    ) -> None:
        self._app = app
        self._access = access
        self._rates = RequestRates(settings.max_requests_per_minute)
        self._admission = admission
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handles one request, or the app's lifespan."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        self._metrics.begin_request()
        try:
            await self._pass(scope, receive, answer)
        except ApiError as api_error:
            await api_error.response()(scope, receive, answer)
        except _ClientLeft:
            answer.status = CLIENT_LEFT
        except asyncio.CancelledError:
            answer.status = answer.status or CLIENT_LEFT
            raise
        finally:
            self._metrics.end_request(route_of(scope["path"]), answer.status or 500, model=scope.get(SERVED, ""))

    async def _pass(self, scope: Message, receive: Receive, answer: "_Answer") -> None:
        headers = {name: value for name, value in scope["headers"]}
        parties = self._admit(scope, headers)
        if scope["method"] != "POST":
            await self._app(scope, receive, answer)
            return
        deadline = asyncio.timeout(None)  # set when reading begins
        with self._admission.body(parties, lambda: deadline.reschedule(0.0)) as place:
            body = await self._read_body(receive, headers.get(b"content-length"), place, deadline)
            with self._admission.request(place):
                await self._while_client_stays(scope, body, receive, answer)

    def _admit(self, scope: Message, headers: dict[bytes, bytes]) -> tuple[str, ...]:
        """Returns the parties that a request counts against. Raises ApiError if its caller may not send it, or not
        yet."""
        address = party_of_address(scope["client"][0] if scope.get("client") else "")
        authorization = headers[b"authorization"].decode("latin-1") if b"authorization" in headers else None
        if scope["path"] == METRICS:
            self._access.read_metrics(authorization)
        if not scope["path"].startswith(PROTECTED):
            return (address,)

        def is_own_user() -> bool:
            return OWN_USER in scope and not any(name in headers for name in PROXY_HEADERS) and scope[OWN_USER]()

        caller = self._access.generating(authorization, is_own_user)
        scope[CLUSTERS] = caller.clusters
        self._rates.take(caller.party or address)
        return (address, caller.party) if caller.party else (address,)

    async def _read_body(
        self, receive: Receive, announced: bytes | None, place: Place, deadline: asyncio.Timeout
    ) -> bytes:
        """Returns the whole body. Raises ApiError; reads on in a body that is too large, so that its client, still
        sending, gets to read the error."""
        limit_bytes = self._settings.max_body_bytes
        most_bytes = DRAINED_BODIES * limit_bytes
        too_large = ApiError(
            413, f"the body is larger than {limit_bytes} bytes", code="request_too_large", headers=CLOSE
        )
        if announced is not None and announced.isdigit() and int(announced[:MAX_DIGITS]) > most_bytes:
            raise too_large
        chunks: list[bytes] = []
        seen_bytes, more = 0, True
        try:
            async with deadline:
                deadline.reschedule(asyncio.get_running_loop().time() + self._settings.body_timeout_s)
                while more and seen_bytes <= most_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeft
                    chunk = message.get("body", b"")
                    more = message.get("more_body", False)
                    seen_bytes += len(chunk)
                    if seen_bytes <= limit_bytes:
                        self._admission.take(place, len(chunk))
                        chunks.append(chunk)
        except TimeoutError as exc:
            within = "while others needed its room" if place.ended else f"within {self._settings.body_timeout_s:g} s"
            raise ApiError(408, f"the body did not arrive {within}", headers=CLOSE) from exc
        if seen_bytes > limit_bytes:
            raise too_large
        return b"".join(chunks)

    async def _while_client_stays(self, scope: Message, body: bytes, receive: Receive, answer: "_Answer") -> None:
        """Runs the route; cancels it, and with it the generation, if the client disconnects."""
        handed_over = False

        async def replay() -> Message:
            nonlocal handed_over
            if not handed_over:
                handed_over = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # until the route ends: the disconnect is detected below
            raise AssertionError("nobody sets it")

        route = asyncio.ensure_future(self._app(scope, replay, answer))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({route, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not route.done() and not answer.complete:
                raise _ClientLeft
            await route
        finally:
            gone.cancel()
            route.cancel()
            await asyncio.gather(route, gone, return_exceptions=True)


class _Answer:
    """Forwards the response; records its status and whether it is complete."""

    def __init__(self, send: Send) -> None:
        self.status = 0
        self.complete = False
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        await self._send(message)


class _ClientLeft(Exception):
    """The client disconnected."""


def route_of(path: str) -> str:
    """Returns the metric label of a path: one of a fixed set, whatever clients ask for."""
    if path in ROUTES:
        return path
    return "/v1/models/{model}" if path.startswith("/v1/models/") else "other"
