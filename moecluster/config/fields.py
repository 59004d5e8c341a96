"""Declares, reads and checks a section of settings. The sections themselves are in sections/.

A section is a frozen keyword-only dataclass that derives from `Section`; each field is one line made by `setting`.
Every error is a ConfigError of one line: section.key, the value given, the value expected.
"""

import difflib
import math
import operator
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from moecluster.errors import ConfigError

MIB = 1024 * 1024

SectionT = TypeVar("SectionT", bound="Section")

_BOUNDS: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
    ("minimum", "at least", operator.ge),
    ("above", "more than", operator.gt),
    ("maximum", "at most", operator.le),
    ("below", "less than", operator.lt),
)
_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def setting(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Declares a field of a section.

    `minimum` and `maximum` are inclusive, `above` and `below` exclusive; for a list they apply to every item. `choices`
    applies to strings only, so a field that also takes a table can list its allowed strings.
    """
    metadata = {
        "doc": doc,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
        "choices": choices,
    }
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all sections: checks ranges and choices at construction."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for declared in fields(self):
            _check_range(getattr(self, declared.name), declared.metadata, f"{self.section}.{declared.name}")
        self.check()

    def check(self) -> None:
        """Checks rules over several fields. Raises ConfigError."""

    def complain(self, key: str, requirement: str) -> ConfigError:
        """Returns a ConfigError about one key of this section, for `check` to raise."""
        return ConfigError(f"{self.section}.{key}: got {show(getattr(self, key))}, {requirement}")


def read_section(cls: type[SectionT], table: Mapping[str, Any]) -> SectionT:
    """Makes a section from a TOML table, strictly: unknown keys raise ConfigError, missing keys take their defaults."""
    hints = get_type_hints(cls)
    keys = [declared.name for declared in fields(cls)]
    for key in table:
        if key not in keys:
            raise ConfigError(f"{cls.section}.{key}: unknown key; {suggest(key, keys)}")
    return cls(**{key: _convert(value, hints[key], f"{cls.section}.{key}") for key, value in table.items()})


def suggest(given: str, known: Iterable[str]) -> str:
    """'did you mean a or b?' if known names are close to the given one, else a list of all known names."""
    known = list(known)
    close = difflib.get_close_matches(given, known, n=2, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(known)}" if known else "none is known here"


def show(value: Any) -> str:
    """A value in TOML notation, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # of str: hexadecimal digits may be more than it converts
        return "a number with thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def bounds(limits: Mapping[str, Any]) -> str:
    """The range in a field's metadata, in words; empty if there is none."""
    return " and ".join(f"{words} {limits[key]}" for key, words, _ in _BOUNDS if limits[key] is not None)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Converts a value to the field's declared type: lists become tuples, integers floats; nothing else changes."""
    if hint is Any:
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        option = next((option for option in arguments if _fits(value, option)), None)
        if option is None:
            raise _wrong_type(value, hint, name)
        return _convert(value, option, name)
    if not _fits(value, hint):
        raise _wrong_type(value, hint, name)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return tuple(_convert(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise _wrong_type(value, hint, name)
        return tuple(_convert(item, arguments[i], f"{name}[{i}]") for i, item in enumerate(value))
    if origin is not None:
        return {key: _convert(item, arguments[1], f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{name}: got {show(value)}, expected an integer of at most 64 bits")
    if hint is float:
        if not math.isfinite(value):
            raise ConfigError(f"{name}: got {value}, expected a finite number")
        return float(value)
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether the outermost type is right; items are checked when they are converted."""
    origin = get_origin(hint)
    if origin is tuple:
        return isinstance(value, list | tuple)
    if origin is not None:
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """A field's type in words, for TOML values."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(option) for option in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each item {type_name(arguments[0])}"
        return f"a list of {len(arguments)} items, each {type_name(arguments[0])}"
    return "a table" if origin is not None else _TYPE_NAMES[hint]


def _wrong_type(value: Any, hint: Any, name: str) -> ConfigError:
    return ConfigError(f"{name}: got {show(value)}, expected {type_name(hint)}")


def _check_range(value: Any, limits: Mapping[str, Any], name: str) -> None:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_range(item, limits, f"{name}[{i}]")
    elif isinstance(value, str):
        choices = limits["choices"]
        if choices is not None and value not in choices:
            raise ConfigError(f"{name}: got {show(value)}, expected one of {', '.join(choices)}")
    elif isinstance(value, int | float) and not all(
        holds(value, limits[key]) for key, _, holds in _BOUNDS if limits[key] is not None
    ):
        raise ConfigError(f"{name}: got {show(value)}, expected {bounds(limits)}")
