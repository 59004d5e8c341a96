"""Checks of common message fields: names, paths, addresses, experts and numbers. Raise InvalidMessage."""

import math
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TypeVar

from moecluster.addresses import split_host_port
from moecluster.errors import InvalidMessage
from moecluster.proto import tensor_pb2
from moecluster.types import ExpertId

EnumT = TypeVar("EnumT", bound=Enum)

MAX_NAME_LENGTH = 256
MAX_PATH_LENGTH = 4096
MAX_REASON_LENGTH = 1000
SHARE_TOLERANCE = 1e-6
MAX_MESSAGE_BYTES = 256 * 2**20
MAX_EXPERTS = 2**18  # in one message


def checked_name(name: str, field: str) -> str:
    """The name of a router, an actor or a request: not empty, printable, of bounded length."""
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise InvalidMessage(field, f"{name[:40]!r}, expected 1 to {MAX_NAME_LENGTH} printable characters")
    return name


def checked_optional_name(name: str, field: str) -> str:
    """A checked name, or an empty string."""
    return checked_name(name, field) if name else ""


def checked_names(names: Iterable[str], field: str) -> tuple[str, ...]:
    """Distinct names."""
    checked = tuple(checked_name(name, field) for name in names)
    if len(set(checked)) != len(checked):
        twice = next(name for name in checked if checked.count(name) > 1)
        raise InvalidMessage(field, f"{twice} is named twice")
    return checked


def checked_choice(value: str, choices: type[EnumT], field: str) -> EnumT:
    """The enum member with this value."""
    try:
        return choices(value)
    except ValueError:
        known = ", ".join(str(member.value) for member in choices)
        raise InvalidMessage(field, f"{value[:40]!r}, expected one of {known}") from None


def checked_path(path: str, field: str) -> str:
    """A directory's path: not empty, no zero byte, of bounded length."""
    if not path or len(path) > MAX_PATH_LENGTH or "\0" in path:
        raise InvalidMessage(field, f"{path[:40]!r}, expected a path of 1 to {MAX_PATH_LENGTH} characters")
    return path


def checked_address(address: str, field: str) -> str:
    """host:port."""
    try:
        split_host_port(address)
    except ValueError:
        raise InvalidMessage(field, f"{address[:40]!r}, expected host:port") from None
    return address


def checked_optional_address(address: str, field: str) -> str:
    """A checked address, or an empty string."""
    return checked_address(address, field) if address else ""


def checked_amount(value: float, field: str) -> float:
    """A finite number that is not negative."""
    if not (math.isfinite(value) and value >= 0):
        raise InvalidMessage(field, f"{value}, expected a finite number of at least 0")
    return value


def checked_count(value: int, field: str, *, least: int = 0) -> int:
    """An integer of at least `least`."""
    if value < least:
        raise InvalidMessage(field, f"{value}, expected at least {least}")
    return value


def checked_within(value: float, lowest: float, highest: float, field: str) -> float:
    """A number within [lowest, highest]."""
    if not lowest <= value <= highest:  # true for NaN too
        raise InvalidMessage(field, f"{value}, not within {lowest:g} and {highest:g}")
    return value


def checked_share(share: float, field: str) -> float:
    """A share of an expert's tokens, within 0 and 1."""
    if not 0 <= share <= 1 + SHARE_TOLERANCE:  # false for NaN too
        raise InvalidMessage(field, f"{share}, not within 0 and 1")
    return share


def encode_expert(expert: ExpertId) -> tensor_pb2.ExpertRef:
    """Encodes an expert id."""
    return tensor_pb2.ExpertRef(layer=expert.layer, index=expert.index)


def encode_experts(experts: Iterable[ExpertId]) -> list[tensor_pb2.ExpertRef]:
    """Encodes expert ids, in order."""
    return [encode_expert(expert) for expert in experts]


def decode_expert(message: tensor_pb2.ExpertRef, field: str) -> ExpertId:
    """Decodes an expert id; the receiver must check whether the model has the expert."""
    if message.layer < 0 or message.index < 0:
        raise InvalidMessage(field, f"{message.layer}/{message.index}, a negative layer or index")
    return ExpertId(layer=message.layer, index=message.index)


def decode_experts(messages: Sequence[tensor_pb2.ExpertRef], field: str) -> tuple[ExpertId, ...]:
    """Decodes distinct expert ids, at most MAX_EXPERTS."""
    if len(messages) > MAX_EXPERTS:
        raise InvalidMessage(field, f"{len(messages)}, at most {MAX_EXPERTS}")
    experts = tuple(decode_expert(message, field) for message in messages)
    if len(set(experts)) != len(experts):
        raise InvalidMessage(field, "an expert is named twice")
    return experts
