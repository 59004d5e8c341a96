"""Fields that many messages have: names, paths, addresses, experts and numbers, checked before they are used."""

import math
from collections.abc import Iterable, Sequence

from moecluster.errors import InvalidMessage
from moecluster.proto import tensor_pb2
from moecluster.types import ExpertId

MAX_NAME_LENGTH = 256
MAX_PATH_LENGTH = 4096
MAX_REASON_LENGTH = 1000
SHARE_TOLERANCE = 1e-6
MAX_MESSAGE_BYTES = 256 * 2**20


def checked_name(name: str, field: str) -> str:
    """The name of a router, an actor or a request: not empty, printable, of bounded length."""
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise InvalidMessage(f"{field}: {name[:40]!r}, expected 1 to {MAX_NAME_LENGTH} printable characters")
    return name


def checked_optional_name(name: str, field: str) -> str:
    """The same, or nothing."""
    return checked_name(name, field) if name else ""


def checked_names(names: Iterable[str], field: str) -> tuple[str, ...]:
    """Names that differ."""
    checked = tuple(checked_name(name, field) for name in names)
    if len(set(checked)) != len(checked):
        twice = next(name for name in checked if checked.count(name) > 1)
        raise InvalidMessage(f"{field}: {twice} is named twice")
    return checked


def checked_path(path: str, field: str) -> str:
    """A directory's path: not empty, no zero byte, of bounded length."""
    if not path or len(path) > MAX_PATH_LENGTH or "\0" in path:
        raise InvalidMessage(f"{field}: {path[:40]!r}, expected a path of 1 to {MAX_PATH_LENGTH} characters")
    return path


def checked_address(address: str, field: str) -> str:
    """host:port."""
    host, separator, port = address.rpartition(":")
    if not (host and separator and port.isdecimal() and 0 < int(port) < 65536 and len(address) <= MAX_NAME_LENGTH):
        raise InvalidMessage(f"{field}: {address[:40]!r}, expected host:port")
    return address


def checked_amount(value: float, field: str) -> float:
    """A finite number that is not negative."""
    if not (math.isfinite(value) and value >= 0):
        raise InvalidMessage(f"{field}: {value}, expected a finite number of at least 0")
    return value


def checked_count(value: int, field: str, *, least: int = 0) -> int:
    """A whole number of at least `least`."""
    if value < least:
        raise InvalidMessage(f"{field}: {value}, expected at least {least}")
    return value


def checked_share(share: float, field: str) -> float:
    """A part of an expert's tokens: within 0 and 1."""
    if not 0 <= share <= 1 + SHARE_TOLERANCE:  # false for NaN too
        raise InvalidMessage(f"{field}: {share}, not within 0 and 1")
    return share


def encode_expert(expert: ExpertId) -> tensor_pb2.ExpertRef:
    """The message of an expert's name."""
    return tensor_pb2.ExpertRef(layer=expert.layer, index=expert.index)


def decode_expert(message: tensor_pb2.ExpertRef, field: str) -> ExpertId:
    """An expert's name; whether the model has it, the receiver knows."""
    if message.layer < 0 or message.index < 0:
        raise InvalidMessage(f"{field}: {message.layer}/{message.index}, a negative layer or index")
    return ExpertId(layer=message.layer, index=message.index)


def decode_experts(messages: Sequence[tensor_pb2.ExpertRef], field: str) -> tuple[ExpertId, ...]:
    """Experts that differ."""
    experts = tuple(decode_expert(message, field) for message in messages)
    if len(set(experts)) != len(experts):
        raise InvalidMessage(f"{field}: an expert is named twice")
    return experts
