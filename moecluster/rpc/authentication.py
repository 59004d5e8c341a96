"""Who calls, and whether they may: servers check it before anything else, over gRPC and HTTP alike."""

import hmac
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from moecluster.errors import ConfigError, MissingScope, MoeClusterError, Unauthenticated
from moecluster.rpc.credentials import ClusterCredentials, is_token
from moecluster.rpc.scopes import Scope, required_scope
from moecluster.rpc.status_codes import abort_with
from moecluster.rpc.tokens import read_token

logger = logging.getLogger(__name__)

HEALTH_PREFIX = "/grpc.health.v1.Health/"
AUTHORIZATION = "authorization"
SCHEME = "bearer"
MAX_ANONYMOUS_CALLS = 16  # concurrent health calls without credentials, so that these cannot occupy all threads
WANTED = (
    'send the metadata "authorization: Bearer CREDENTIAL" with the secret of this cluster, which moecluster up wrote '
    "to NAME.secret in its state folder, or with a token that moecluster token makes from it (a client takes the file "
    "of either as secret_file=, or in $MOECLUSTER_SECRET_FILE)"
)
Details = grpc.HandlerCallDetails
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in its stub alone


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Whose call it is."""

    name: str  # the subject of the token; empty: whoever has the secret
    scopes: frozenset[Scope] | None  # None: everything

    def require(self, scope: Scope | None, what: str) -> None:
        """Raises MissingScope if the caller may not do `what`. scope: that it requires; None: the secret alone."""
        if self.scopes is None or scope in self.scopes:
            return
        if scope is None:
            raise MissingScope(f"authorization: {what} takes the cluster's secret alone, and no token")
        has = " ".join(sorted(self.scopes)) or "none"
        raise MissingScope(f"authorization: {what} requires a token with the scope {scope}; this one has {has}")


class BearerCheck:
    """Tells who sent an authorization: whoever has the cluster's secret, or the holder of a token."""

    def __init__(self, credentials: ClusterCredentials) -> None:
        """Raises ConfigError for a token, which cannot check others."""
        if not credentials.secret:
            raise ConfigError("a server needs the cluster's secret itself, and was given a token")
        self._credentials = credentials

    def caller(self, authorization: str | bytes) -> Caller:
        """Returns who sent it. Raises Unauthenticated, whose message holds nothing that was sent."""
        sent = authorization if isinstance(authorization, bytes) else authorization.encode(errors="replace")
        scheme, _, bearer = sent.partition(b" ")
        if scheme.lower() != SCHEME.encode():
            raise Unauthenticated("authorization: no Bearer")
        if hmac.compare_digest(bearer, self._credentials.secret.encode()):
            return Caller(name="", scopes=None)
        text = bearer.decode("ascii", errors="replace")
        if not is_token(text):
            raise Unauthenticated("authorization: the wrong secret, and no token")
        try:
            claims = read_token(self._credentials, text)
        except Unauthenticated as exc:
            raise Unauthenticated(f"authorization: {exc}") from None
        return Caller(name=claims.subject, scopes=claims.scopes)


class RequireCredentials(grpc.ServerInterceptor):
    """Refuses calls that their caller may not make before reading a byte of the body. Health calls are free."""

    def __init__(self, credentials: ClusterCredentials) -> None:
        """Raises ConfigError for a token in place of the secret."""
        self._check = BearerCheck(credentials)
        self._anonymous = threading.BoundedSemaphore(MAX_ANONYMOUS_CALLS)

    def intercept_service(
        self, continuation: "Callable[[Details], Handler | None]", handler_call_details: Details
    ) -> "Handler | None":
        method = handler_call_details.method
        is_health = method.startswith(HEALTH_PREFIX)
        try:
            caller = self._check.caller(_authorization(handler_call_details))
            if not is_health:
                _admit(caller, method)
        except Unauthenticated as exc:
            if not is_health:
                return _refusal(Unauthenticated(f"{exc}; {WANTED}"))
            found = continuation(handler_call_details)
            return None if found is None else _bounded(found, self._anonymous)
        except MissingScope as exc:
            return _refusal(exc)
        return continuation(handler_call_details)


def _authorization(details: Details) -> str | bytes:
    metadata: Any = details.invocation_metadata or ()  # pairs, despite the type stub
    given: list[str | bytes] = [value for key, value in metadata if key == AUTHORIZATION]
    if len(given) == 1:
        return given[0]
    raise Unauthenticated(f"authorization: {'given more than once' if given else 'missing'}")


def _admit(caller: Caller, method: str) -> None:
    scope = required_scope(method)
    service, _, name = method.removeprefix("/").rpartition("/")
    caller.require(scope, f"{service.rpartition('.')[2]}.{name}")
    if caller.name and scope in (Scope.OPERATE, Scope.TRAIN):
        logger.info("%s called %s", caller.name, method)


def _refusal(error: MoeClusterError) -> Handler:
    def refuse(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        abort_with(context, error)

    # A streaming handler does not wait for the first request; the caller cannot tell the kinds of call apart.
    return grpc.stream_unary_rpc_method_handler(refuse)


def _bounded(handler: Handler, room: threading.BoundedSemaphore) -> Handler:
    """Wraps a handler of a single request, limiting how many concurrent callers may occupy a server thread."""

    def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        if not room.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls without credentials at once")
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
