"""JSON as RFC 8259 has it: what Python's parser takes beyond that, or drops without a word, is refused."""

import json
import math
import re
from typing import Any

MAX_DEPTH = 64
SHOWN_CHARACTERS = 60
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a pair, or a half of a whole one


class JsonProblem(ValueError):
    """Why some bytes are not taken. One line of ASCII."""

    def __init__(self, message: str, path: str = "") -> None:
        """path: of the part that is to blame, such as messages[0].content; empty: the whole."""
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path


class TooDeep(JsonProblem):
    """Values in values in values."""

    def __init__(self) -> None:
        super().__init__(f"nested more than {MAX_DEPTH} levels deep")


def parse_json(content: bytes) -> Any:
    """The value. A byte order mark before it is passed over. Raises JsonProblem.

    Refused are other encodings than UTF-8, NaN and infinity (written out or as 1e999), a key that stands twice in an
    object, half a surrogate pair, more than MAX_DEPTH levels, numbers of thousands of digits.
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
        _check_texts(value, "")
    return value


def shown(text: str) -> str:
    """A text that somebody sent, in ASCII, quoted and shortened."""
    return json.dumps(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise JsonProblem(f"the key {shown(name)} stands twice in an object")
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


def _check_texts(value: Any, path: str) -> None:
    """Raises JsonProblem for a text, keys included, that UTF-8 cannot hold. No deeper than MAX_DEPTH."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise JsonProblem("a text with half a surrogate pair, which is no unicode character", path) from exc
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_texts(name, path)
            where = shown(name)[1:-1]
            _check_texts(inner, f"{path}.{where}" if path else where)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_texts(inner, f"{path}[{i}]")
