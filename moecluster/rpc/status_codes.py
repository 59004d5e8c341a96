"""Maps MoeClusterErrors to gRPC status codes and reply codes, and back."""

import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import grpc

from moecluster.errors import (
    AttemptAborted,
    BatchBroken,
    ContextLengthExceeded,
    DeadlineExceeded,
    Exhausted,
    ExpertsLost,
    InvalidMessage,
    MissingScope,
    MoeClusterError,
    NotGiven,
    NotHosted,
    RequestFailed,
    StaleRequest,
    StateLost,
    TlsMismatch,
    Unauthenticated,
    Unavailable,
    UserError,
)
from moecluster.proto import expert_pb2
from moecluster.rpc.tls.mismatch import IS_PLAIN, OF_ANOTHER_CA
from moecluster.types import PlacementNumber

RETRY_AFTER = "retry-after-s"  # metadata of RESOURCE_EXHAUSTED: seconds until a retry is likely to succeed
FAULT = "fault"  # metadata of INTERNAL: what failed: the request, its batch, or experts
FIELD = "invalid-field"  # metadata of INVALID_ARGUMENT: the wrong field; the detail begins with it
CONTEXT_LENGTH = "context-length"  # the only FAULT of INVALID_ARGUMENT
SCOPE = "scope"  # the only FAULT of PERMISSION_DENIED
LATE = "Deadline Exceeded"  # gRPC's own detail when a call times out
# Words of gRPC's own detail when a connection is not made -> what they mean.
_TLS_FAILURES = (("CERTIFICATE_VERIFY_FAILED", OF_ANOTHER_CA), ("WRONG_VERSION_NUMBER", IS_PLAIN))
_ENDED = "Socket closed"  # by a server that is being restarted, or speaks TLS and was sent plain text: see mismatch_at
_MAY_WANT_TLS = (
    "it ends new connections: does it require TLS (security.tls_dir), and certificates of its own CA? Clients take "
    "them as tls_dir=, or $MOECLUSTER_TLS_DIR"
)
NOT_CONNECTED = "failed to connect"
AnswerT = TypeVar("AnswerT")

_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,63}")

# The first matching class decides.
_STATUS: tuple[tuple[type[MoeClusterError], grpc.StatusCode], ...] = (
    (InvalidMessage, grpc.StatusCode.INVALID_ARGUMENT),
    (NotGiven, grpc.StatusCode.PERMISSION_DENIED),
    (MissingScope, grpc.StatusCode.PERMISSION_DENIED),
    (UserError, grpc.StatusCode.FAILED_PRECONDITION),
    (Exhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotHosted, grpc.StatusCode.NOT_FOUND),
    (StaleRequest, grpc.StatusCode.OUT_OF_RANGE),
    (AttemptAborted, grpc.StatusCode.ABORTED),
    (StateLost, grpc.StatusCode.DATA_LOSS),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
)
_FAULTS: tuple[tuple[type[MoeClusterError], str], ...] = (
    (RequestFailed, "request"),
    (BatchBroken, "batch"),
    (ExpertsLost, "experts"),
)
_REPLY_CODES: tuple[tuple[type[MoeClusterError], "expert_pb2.ReplyCode"], ...] = (
    (InvalidMessage, expert_pb2.INVALID_ARGUMENT),
    (Exhausted, expert_pb2.RESOURCE_EXHAUSTED),
    (NotHosted, expert_pb2.NOT_HOSTED),
    (StaleRequest, expert_pb2.STALE),
    (DeadlineExceeded, expert_pb2.DEADLINE_EXCEEDED),
    (AttemptAborted, expert_pb2.ABORTED),
    (StateLost, expert_pb2.STATE_LOST),
    (Unavailable, expert_pb2.UNAVAILABLE),
)


def status_of(error: MoeClusterError) -> grpc.StatusCode:
    """The status code for an error."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def abort_with(context: grpc.ServicerContext, error: MoeClusterError) -> NoReturn:
    """Ends an RPC with the error's status and its message as the detail."""
    context.set_trailing_metadata(_metadata_of(error))
    context.abort(status_of(error), str(error))
    raise AssertionError("abort raises")


def _metadata_of(error: MoeClusterError) -> tuple[tuple[str, str], ...]:
    """The trailing metadata for an error, beside its status and detail."""
    found = [(FAULT, fault) for kind, fault in _FAULTS if isinstance(error, kind)]
    if isinstance(error, ContextLengthExceeded):
        found.append((FAULT, CONTEXT_LENGTH))
    if isinstance(error, MissingScope):
        found.append((FAULT, SCOPE))
    if isinstance(error, Exhausted) and error.retry_after_s is not None:
        found.append((RETRY_AFTER, f"{error.retry_after_s:.3f}"))
    if isinstance(error, InvalidMessage) and _FIELD_NAME.fullmatch(error.field):
        found.append((FIELD, error.field))
    return tuple(found)


def answer(context: grpc.ServicerContext, call: Callable[[], AnswerT]) -> AnswerT:
    """Returns the call's result, or aborts the RPC with the status of its error."""
    try:
        return call()
    except MoeClusterError as exc:
        abort_with(context, exc)


def from_rpc_error(error: grpc.RpcError, peer: str = "peer") -> MoeClusterError:
    """The MoeClusterError for a failed RPC."""
    code = error.code()  # on the client side every RpcError is a grpc.Call
    detail = error.details() or code.name
    if detail == LATE:
        detail = f"{peer}: no answer within the deadline"
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Exhausted(detail, retry_after_s=_retry_after_s(error))
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return _invalid_message(error, detail)
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return Unauthenticated(f"{peer}: {detail}")
    if code == grpc.StatusCode.PERMISSION_DENIED and SCOPE in _metadata(error, FAULT):
        return MissingScope(f"{peer}: {detail}")
    if code == grpc.StatusCode.UNAVAILABLE and detail.startswith(NOT_CONNECTED):
        detail = "".join(filter(str.isprintable, detail.partition("\n")[0]))  # gRPC 1.85 adds memory that it never set
        for word, meaning in _TLS_FAILURES:
            if word in detail:
                return TlsMismatch(f"{peer}: {meaning}; {detail}")
        return Unavailable(f"{peer}: {f'{_MAY_WANT_TLS}; ' if _ENDED in detail else ''}{detail}")
    for kind, status in _STATUS:
        if code == status and kind is not UserError:
            return kind(detail)
    for kind, fault in _FAULTS:
        if code == grpc.StatusCode.INTERNAL and fault in _metadata(error, FAULT):
            return kind(detail)
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        return UserError(detail)
    if code == grpc.StatusCode.CANCELLED:
        return Unavailable(f"{peer}: the call was cancelled")
    if code == grpc.StatusCode.UNIMPLEMENTED:  # the port of an ended process may now belong to another
        return Unavailable(f"{peer}: what listens there now is no such service")
    return MoeClusterError(f"{peer}: {code.name}: {detail}")


def _invalid_message(error: grpc.RpcError, detail: str) -> InvalidMessage:
    """The error with its field, if the metadata name one and the detail begins with it."""
    kind = ContextLengthExceeded if CONTEXT_LENGTH in _metadata(error, FAULT) else InvalidMessage
    field = next(iter(_metadata(error, FIELD)), "")
    if _FIELD_NAME.fullmatch(field) and detail.startswith(f"{field}: "):
        return kind(field, detail.removeprefix(f"{field}: "))
    return kind("", detail)


def _retry_after_s(error: grpc.RpcError) -> float | None:
    said = _metadata(error, RETRY_AFTER)
    try:
        after_s = float(said[0]) if said else math.nan
    except ValueError:
        return None
    return after_s if math.isfinite(after_s) and after_s >= 0 else None


def _metadata(error: grpc.RpcError, name: str) -> list[str]:
    metadata: Any = error.trailing_metadata() or ()  # pairs, despite the type stub
    return [value for key, value in metadata if key == name]


def reply_code_of(error: MoeClusterError) -> "expert_pb2.ReplyCode":
    """The reply code for an error of one batch of a Compute stream."""
    return next((code for kind, code in _REPLY_CODES if isinstance(error, kind)), expert_pb2.INTERNAL)


def error_of_reply(message: expert_pb2.BatchReply) -> MoeClusterError:
    """The error for a failed reply of a Compute stream."""
    for kind, code in _REPLY_CODES:
        if message.code == code:
            if kind is NotHosted:
                return NotHosted(message.detail, placement=PlacementNumber(message.placement_term, message.generation))
            if kind is InvalidMessage:
                return InvalidMessage("", message.detail)
            return kind(message.detail)
    return MoeClusterError(message.detail or "the expert actor failed")
