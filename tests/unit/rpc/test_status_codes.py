"""Errors over gRPC: they arrive as raised, and metadata are checked before use."""

import pickle
from typing import Any

import grpc
import pytest

from moecluster.errors import BatchBroken, ContextLengthExceeded, Exhausted, InvalidMessage, MoeClusterError
from moecluster.rpc.status_codes import abort_with, from_rpc_error

OVERFLOW = "its 9 tokens and max_new_tokens = 9 exceed the model's 10"
Metadata = tuple[tuple[str, str], ...]


class Aborted(Exception):
    """Raised by abort, like gRPC's own exception."""


class Context:
    """Records the status, detail and metadata that a servicer sends."""

    metadata: Metadata = ()

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        assert not self.metadata, "the second one would replace the first"
        self.metadata = metadata

    def abort(self, code: grpc.StatusCode, detail: str) -> None:
        self.code, self.detail = code, detail
        raise Aborted


class Failed(grpc.RpcError):
    """The same error on the client side."""

    def __init__(self, code: grpc.StatusCode, detail: str, metadata: Metadata | None) -> None:
        self._code, self._detail, self._metadata = code, detail, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._detail

    def trailing_metadata(self) -> Any:
        return self._metadata


def over_the_wire(error: MoeClusterError) -> MoeClusterError:
    context: Any = Context()
    with pytest.raises(Aborted):
        abort_with(context, error)
    return from_rpc_error(Failed(context.code, context.detail, context.metadata))


@pytest.mark.parametrize(
    "error",
    [
        InvalidMessage("replicas.share", "those of expert 0/1 sum to 2, not 1"),
        InvalidMessage("stop", "a text: with a colon"),
        InvalidMessage("", "no field: is named here"),
        ContextLengthExceeded("prompt_ids", OVERFLOW),
    ],
)
def test_a_wrong_message_keeps_its_kind_its_field_and_its_text(error: InvalidMessage) -> None:
    for back in (over_the_wire(error), pickle.loads(pickle.dumps(error))):
        assert type(back) is type(error)
        assert isinstance(back, InvalidMessage) and (back.field, back.why) == (error.field, error.why)
        assert str(back) == str(error)


@pytest.mark.parametrize("field", ["a b", "x" * 65, "naïve", "0", "a\nb", "[0]"])
def test_a_field_that_is_no_name_is_not_sent(field: str) -> None:
    error = InvalidMessage(field, "wrong")
    back = over_the_wire(error)
    assert isinstance(back, InvalidMessage) and (back.field, str(back)) == ("", str(error))


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        (("invalid-field", "stop"),),  # the detail begins with another one
        (("invalid-field", ""),),
        (("invalid-field", "prompt: its"),),
        (("invalid-field", "x" * 10_000),),
        (("another", "prompt"),),
    ],
)
def test_what_a_peer_says_of_a_field_is_checked(metadata: Metadata | None) -> None:
    back = from_rpc_error(Failed(grpc.StatusCode.INVALID_ARGUMENT, f"prompt: {OVERFLOW}", metadata))
    assert type(back) is InvalidMessage
    assert (back.field, str(back)) == ("", f"prompt: {OVERFLOW}")


def test_the_length_of_a_context_is_exceeded_by_a_wrong_message_only() -> None:
    fault = (("fault", "context-length"), ("invalid-field", "prompt"))
    assert type(from_rpc_error(Failed(grpc.StatusCode.INTERNAL, "prompt: x", fault))) is MoeClusterError
    assert type(from_rpc_error(Failed(grpc.StatusCode.INVALID_ARGUMENT, "x", fault[:1]))) is ContextLengthExceeded


def test_what_else_is_told_beside_a_status_comes_over() -> None:
    full = over_the_wire(Exhausted("full", retry_after_s=1.5))
    assert isinstance(full, Exhausted) and full.retry_after_s == 1.5
    assert type(over_the_wire(BatchBroken("it broke"))) is BatchBroken


def test_what_grpc_adds_to_a_detail_that_it_did_not_write_is_left_out() -> None:
    detail = "failed to connect to all addresses; last error: INTERNAL: socket: Too many open files\n\0\x84\x7f\0"
    back = from_rpc_error(Failed(grpc.StatusCode.UNAVAILABLE, detail, None), "expert-0")
    assert str(back) == f"expert-0: {detail.partition(chr(10))[0]}"
