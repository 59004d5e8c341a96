"""Error responses in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Response

from moecluster.errors import (
    BatchBroken,
    ClusterEnded,
    ContextLengthExceeded,
    DeadlineExceeded,
    Exhausted,
    ExpertsLost,
    InvalidMessage,
    MissingScope,
    MoeClusterError,
    RequestFailed,
    UserError,
)
from moecluster.gateway.schemas.known_fields import UNSUPPORTED

INVALID_REQUEST = "invalid_request_error"
RATE_LIMIT = "rate_limit_error"
SERVER = "server_error"

RETRY_S = 1  # if the router gives no retry time
# The checkpoint's path and the details are in the router's log and in `moecluster status`.
LOST_EXPERTS = "has lost experts that cannot be loaded again: its checkpoint directory is gone or cannot be read"
MAX_MESSAGE_CHARACTERS = 500

_PROMPT_FIELDS = ("prompt", "prompt_ids", "messages_json")  # fields of a router's request
_UNIONS = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "a string or a list of strings",
}
# Parts of a pydantic location that name a field of the body, not a branch of a union.
_INNER_FIELDS = frozenset({"role", "content", "name", "type", "text", "include_usage"})


class ApiError(MoeClusterError):
    """An HTTP error response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """status: HTTP status. kind: `type` in the body. param: the field of the request at fault."""
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE_CHARACTERS else f"{message[:MAX_MESSAGE_CHARACTERS]}..."
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The whole HTTP response."""
        # ASCII, because the message may quote client input that cannot be encoded as UTF-8.
        content = json.dumps(self.body()).encode("ascii")
        return Response(content, self.status, dict(self.headers or {}), "application/json")


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is wrong; a retry would fail again."""
    return ApiError(400, message, param=param, code=code)


def model_not_found(name: str) -> ApiError:
    """404: unknown model name."""
    return ApiError(404, f"The model `{name}` does not exist", param="model", code="model_not_found")


def too_many(message: str, retry_after_s: float | None = None) -> ApiError:
    """429: the same request may succeed later."""
    after_s = max(math.ceil(RETRY_S if retry_after_s is None else retry_after_s), 1)
    headers = {"Retry-After": str(after_s)}
    return ApiError(429, message, kind=RATE_LIMIT, code="rate_limit_exceeded", headers=headers)


def unavailable(message: str) -> ApiError:
    """503: not the client's fault."""
    return ApiError(503, message, kind=SERVER, code="unavailable", headers={"Retry-After": str(RETRY_S)})


def failed(message: str) -> ApiError:
    """500: this request cannot be computed; a retry would fail again."""
    return ApiError(500, message, kind=SERVER, code="request_failed")


def api_error_of(error: MoeClusterError, model: str, *, prompt_param: str = "prompt") -> ApiError:
    """Translates an error of a model's routers. Must not expose their addresses.

    prompt_param: the body field that the prompt came from.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MissingScope):  # of the gateway's own token
        return unavailable(f"{model} cannot be reached: this gateway's token lacks the scope infer")
    if isinstance(error, InvalidMessage | UserError):
        return _wrong_request(error, prompt_param)
    if isinstance(error, RequestFailed | BatchBroken):
        return failed(f"{model} cannot answer this request: {error}")
    if isinstance(error, Exhausted):
        return too_many(f"{model} is busy: {error}", error.retry_after_s)
    if isinstance(error, DeadlineExceeded):
        return unavailable(f"{model} did not finish within the time for a request; ask for fewer tokens")
    if isinstance(error, ExpertsLost):
        return unavailable(f"{model} {LOST_EXPERTS}")
    if isinstance(error, ClusterEnded):
        return unavailable(f"{model} is down: its cluster has ended")
    return unavailable(f"no router of {model} serves now; try again")


def api_error_of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for a body that violates its schema. errors: pydantic's list."""
    refused_field = next((error for error in errors if error["type"] == UNSUPPORTED), None)
    if refused_field is not None:  # takes precedence over errors of other union branches
        param = _param(refused_field)
        return bad_request(f"{param}: {refused_field['msg']}", param=param, code="unsupported_parameter")
    param = _param(errors[0])
    if not param:
        return bad_request("the body is no JSON object; is the header Content-Type: application/json missing?")
    message = "; or: ".join(dict.fromkeys(str(error["msg"]) for error in errors if _param(error) == param))
    expected = f"expected {_UNIONS[param]} ({message})" if param in _UNIONS else message
    return bad_request(f"{param}: {expected}", param=param)


def _param(error: Mapping[str, Any]) -> str:
    """The field's path, such as messages[0].content."""
    names = [name for name in error["loc"] if name != "body"]
    param = str(names[0]) if names else ""
    for name in names[1:] if param not in _UNIONS else ():
        if isinstance(name, int):
            param += f"[{name}]"
        elif name in _INNER_FIELDS:
            param += f".{name}"
    field = error.get("ctx", {}).get("name", "")  # for an error of a whole object: the field at fault
    return f"{param}.{field}" if param and field else param or field


def _wrong_request(error: InvalidMessage | UserError, prompt_param: str) -> ApiError:
    """Replaces the names of a router's fields by those of the body, in the message too."""
    params = {"max_new_tokens": "max_tokens", **dict.fromkeys(_PROMPT_FIELDS, prompt_param)}
    message = re.sub(rf"\b({'|'.join(params)})\b", lambda found: params[found[1]], str(error))
    field = error.field.partition(".")[0] if isinstance(error, InvalidMessage) else ""
    code = "context_length_exceeded" if isinstance(error, ContextLengthExceeded) else None
    return bad_request(message, param=params.get(field, field) or None, code=code)
