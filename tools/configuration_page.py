"""docs/configuration.md: every setting, out of its declaration."""

import dataclasses
import tomllib
from collections.abc import Callable, Iterator, Mapping
from types import UnionType
from typing import Any, get_args, get_type_hints

from moecluster.config.fields import MIB, Section, bounds, show, type_name
from moecluster.config.load import SECTIONS, preset_names, read_config
from moecluster.config.retired import RETIRED, Renamed
from moecluster.moe.gates.base import GateOptions
from moecluster.moe.gates.registry import GATES
from tools.markdown import table

EXAMPLE = """\
[cluster]
num_expert_actors = 4

[model]
path = "/models/my-model"
dtype = "bfloat16"

[serve]
port = 8080
"""
HEAD = ("Setting", "Type", "Default", "Range", "What it does")


def configuration_page() -> str:
    """The page in Markdown."""
    read_config(tomllib.loads(EXAMPLE))
    lines = [
        "# Configuration",
        "",
        "<!-- Written by tools/generate_reference_pages.py: run `make docs`, do not edit. -->",
        "",
        "Every setting has a default that works on a laptop. Give those that you want to change:",
        "",
        "- in a TOML file, with a table for each section: `moecluster up my.toml`;",
        f"- by the name of a preset, a TOML file that comes with moecluster: {_listed(preset_names())};",
        "- with `--set section.key=value`, as often as needed. It overrides the file or the preset. The value is read",
        "  as TOML; what is not TOML is a string: `--set train.steps=100 --set train.data=/data/text`.",
        "",
        "```toml",
        *EXAMPLE.splitlines(),
        "```",
        "",
        "Settings are read strictly: an unknown section or key, a wrong type or a value out of range is one error that",
        "names the setting, what was given and what is expected. `moecluster serve MODEL_DIRECTORY` and other commands",
        "that take a model directory in place of a TOML file use the defaults, with `model.path` set to the directory.",
        "",
        "Names carry their units: `_s` is seconds, `_bytes` is bytes.",
        "",
        f"Sections: {', '.join(f'[{name}](#{name})' for name in SECTIONS)}.",
    ]
    for name, cls in SECTIONS.items():
        lines += ["", f"## {name}", "", _summary(cls), "", *table(HEAD, _rows(cls))]
        if name == "model":
            lines += ["", *_gate_options()]
    return "\n".join([*lines, "", *_retired(), ""])


def _rows(cls: type[Section], *, besides: type[Section] | None = None) -> Iterator[tuple[str, ...]]:
    """A row for each setting of a section; besides: not for those that it has as they are."""
    inherited = {each.name: _declaration(each) for each in dataclasses.fields(besides)} if besides else {}
    hints = get_type_hints(cls)
    for declared in dataclasses.fields(cls):
        if inherited.get(declared.name) != _declaration(declared):
            default, shown = _default(declared), _shown(declared.name)
            limits = {key: shown(value) for key, value in declared.metadata.items() if isinstance(value, int | float)}
            yield (
                f"`{declared.name}`",
                _type(hints[declared.name], declared.metadata["choices"]),
                f"`{show(default)}`" + shown(default).removeprefix(str(default)),
                bounds({**dict.fromkeys(declared.metadata), **limits}),
                declared.metadata["doc"],
            )


def _declaration(declared: "dataclasses.Field[Any]") -> tuple[Any, Mapping[str, Any]]:
    return _default(declared), declared.metadata


def _default(declared: "dataclasses.Field[Any]") -> Any:
    if declared.default_factory is not dataclasses.MISSING:
        return declared.default_factory()
    return declared.default


def _shown(name: str) -> Callable[[Any], str]:
    """How a setting's numbers are shown: bytes with their mebibytes."""

    def shown(value: Any) -> str:
        if name.endswith("_bytes") and value and value % MIB == 0:
            return f"{value} ({value // MIB} MiB)"
        return str(value)

    return shown


def _type(hint: Any, choices: tuple[str, ...] | None) -> str:
    if choices is None:
        return type_name(hint)
    others = [type_name(each) for each in get_args(hint) if each is not str] if isinstance(hint, UnionType) else []
    return " or ".join([*(f'`"{choice}"`' for choice in choices), *others])


def _gate_options() -> Iterator[str]:
    yield from ("### Gate options", "", "Options of every gate, in `model.gate_options`:", "")
    yield from table(HEAD, _rows(GateOptions))
    yield from ("", "What each gate adds, or has another default for:")
    for name, gate in GATES.items():
        yield from ("", f"`{name}`:", "", *table(HEAD, _rows(gate.options_type, besides=GateOptions)))


def _retired() -> Iterator[str]:
    yield from (
        "## Renamed and removed settings",
        "",
        "A setting of an earlier version is refused with its new name.",
        "",
    )
    now = {
        name: f"`{retired.to}`" if isinstance(retired, Renamed) else f"removed: {retired.because}"
        for name, retired in RETIRED.items()
    }
    yield from table(("Setting", "Now"), ((f"`{name}`", became) for name, became in now.items()))


def _summary(cls: type[Section]) -> str:
    assert cls.__doc__, f"{cls.__name__} lacks its docstring"
    return cls.__doc__.splitlines()[0]


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
