"""Makes protobuf messages out of bytes: torn ones, odd ones, and good ones of which some fields are changed."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

if TYPE_CHECKING:
    from google._upb import _message

from tests.support.fuzz.bytes_as_choices import Choices

MessageT = TypeVar("MessageT", bound=Message)
Field: TypeAlias = "FieldDescriptor | _message.FieldDescriptor"  # the second is what messages have
MAX_DEPTH = 4
FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-9, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 3600.0, 60.0)
TEXTS = (
    "", "x", "router", "expert-0", "expert-1", "node-of-expert-0", "0/1", "float32", "adamw", "sgd", "share", "static",
    "127.0.0.1:1", "[::1]:65535", "host:0", "/", "/nonexistent", "/proc/self", "\0", "a\nb", "\x7f", "é\u2028",
    "\U0010ffff", "x" * 300, "y" * 5000, "[]", "{}", '[{"role": "user", "content": "x"}]',
    '[{"role": "user", "content": "\\ud800"}]', "[" * 3000, "1" * 5000, "NaN",
)  # fmt: skip
COUNTS = (0, 1, 1, 2, 3, 17, 300)
# What a 64-bit or 32-bit field takes; others are cut to the field's range.
INTEGERS = (0, 1, 2, 3, 4, 7, 8, 32, 64, 255, 256, 259, 1000, 2**16, 2**18, 2**20 + 1, 2**31 - 1, 2**32 - 1, 2**63 - 1,
            2**64 - 1, -1, -2, -(2**31), -(2**63))  # fmt: skip
RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def message_of(data: bytes, kind: type[MessageT], good: Sequence[MessageT] = ()) -> MessageT | None:
    """Returns a message; None if the bytes are no message at all, which gRPC itself refuses. good: valid ones."""
    choices = Choices(data)
    how = choices.number(4 if good else 2)
    message = kind()
    if how == 0:
        return _parsed(choices.rest(), kind)
    if how == 1:
        fill(message, choices)
    elif how == 2:
        message.CopyFrom(choices.one_of(good))
        fill(message, choices, part=8)
    else:
        return _parsed(_torn(choices.one_of(good).SerializeToString(), choices), kind)
    return message


def fill(message: Message, choices: Choices, *, part: int = 2, depth: int = 0) -> None:
    """Sets one in `part` of a message's fields."""
    for field in message.DESCRIPTOR.fields:
        if choices.number(part):
            continue
        message.ClearField(field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _fill_map(getattr(message, field.name), field, choices)
        elif field.is_repeated:
            _fill_repeated(getattr(message, field.name), field, choices, depth)
        elif field.message_type is None:
            setattr(message, field.name, _value(field, choices))
        elif depth < MAX_DEPTH:
            inner = getattr(message, field.name)
            inner.SetInParent()
            fill(inner, choices, depth=depth + 1)


def _fill_map(entries: Any, field: Field, choices: Choices) -> None:
    entry = field.message_type
    assert entry is not None, f"{field.name} is no map"
    key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
    for _ in range(choices.one_of(COUNTS)):
        entries[_value(key, choices)] = _value(value, choices)


def _fill_repeated(items: Any, field: Field, choices: Choices, depth: int) -> None:
    for _ in range(choices.one_of(COUNTS)):
        if field.message_type is None:
            items.append(_value(field, choices))
        elif depth < MAX_DEPTH:
            fill(items.add(), choices, depth=depth + 1)


def _value(field: Field, choices: Choices) -> Any:
    if field.cpp_type in RANGES:
        low, high = RANGES[field.cpp_type]
        return min(max(choices.one_of(INTEGERS), low), high)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return choices.one_of(FLOATS)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return bool(choices.number(2))
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return choices.number(8)  # also values that the enum lacks
    if field.type == FieldDescriptor.TYPE_BYTES:
        return choices.take(choices.one_of((0, 1, 4, 16, 32, 256)))
    return choices.one_of(TEXTS) or choices.take(8).decode(errors="replace")


def _parsed(data: bytes, kind: type[MessageT]) -> MessageT | None:
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def _torn(data: bytes, choices: Choices) -> bytes:
    """Returns the bytes with some replaced, taken out or put in."""
    torn = bytearray(data)
    for _ in range(1 + choices.number(6)):
        at = choices.number(len(torn) + 1)
        torn[at : at + choices.number(3)] = choices.take(choices.number(4))
    return bytes(torn)
