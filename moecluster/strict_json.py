"""Strict JSON (RFC 8259): refuses what Python's parser accepts beyond it, or silently drops."""

import json
import math
import re
from typing import Any

MAX_DEPTH = 64
SHOWN_CHARACTERS = 60
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # an escaped surrogate, alone or of a pair


class JsonProblem(ValueError):
    """Why some bytes are refused, in one line of ASCII."""

    def __init__(self, message: str, path: str = "") -> None:
        """path: of the part at fault, such as messages[0].content; empty: the whole."""
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path


class TooDeep(JsonProblem):
    """The value is nested too deeply."""

    def __init__(self) -> None:
        super().__init__(f"nested more than {MAX_DEPTH} levels deep")


def parse_json(content: bytes) -> Any:
    """Returns the value. Skips a byte order mark. Raises JsonProblem.

    Refuses encodings other than UTF-8, NaN and infinity (written out or as 1e999), duplicate keys in an object, half a
    surrogate pair, more than MAX_DEPTH levels, and numbers of thousands of digits.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise JsonProblem(f"not UTF-8 at byte {exc.start}") from exc
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_refuse_constant)
    except JsonProblem:
        raise
    except json.JSONDecodeError as exc:
        raise JsonProblem(f"no JSON ({exc})") from exc
    except RecursionError as exc:
        raise TooDeep from exc
    except ValueError as exc:  # of int: too many digits
        raise JsonProblem("a number with thousands of digits") from exc
    if content.count(b"[") + content.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    if _SURROGATE.search(content):
        _check_strings(value, "")
    return value


def shown(text: str) -> str:
    """Returns a received text quoted and shortened, in ASCII."""
    return json.dumps(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise JsonProblem(f"the key {shown(name)} appears twice in an object")
            seen.add(name)
    return made


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonProblem(f"the number {shown(text)} is too large")
    return value


def _refuse_constant(name: str) -> Any:
    raise JsonProblem(f"{name} is no JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = (part for part in level if isinstance(part, dict | list))
        level = [
            inner
            for part in parts
            for inner in (part.values() if isinstance(part, dict) else part)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise TooDeep


def _check_strings(value: Any, path: str) -> None:
    """Raises JsonProblem for a string, keys included, that UTF-8 cannot encode. The value is at most MAX_DEPTH deep."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise JsonProblem("a text with half a surrogate pair, which is no unicode character", path) from exc
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_strings(name, path)
            where = shown(name)[1:-1]
            _check_strings(inner, f"{path}.{where}" if path else where)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_strings(inner, f"{path}[{i}]")
