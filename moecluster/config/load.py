"""Loads all settings from one TOML file, strictly, into frozen records. The sections are in sections/."""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from moecluster.config.fields import Section, read_section, suggest
from moecluster.config.retired import refuse_retired
from moecluster.config.sections import (
    ClusterConfig,
    ControllerConfig,
    ExpertsConfig,
    ModelConfig,
    RouterConfig,
    SecurityConfig,
    ServeConfig,
    TrainConfig,
)
from moecluster.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """All sections."""

    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    experts: ExpertsConfig = dataclasses.field(default_factory=ExpertsConfig)
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    controller: ControllerConfig = dataclasses.field(default_factory=ControllerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    serve: ServeConfig = dataclasses.field(default_factory=ServeConfig)
    security: SecurityConfig = dataclasses.field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        if not self.model.path and self.train.sequence_length > self.model.max_positions:
            raise self.train.complain(
                "sequence_length", f"expected at most model.max_positions = {self.model.max_positions}"
            )

    def to_tables(self) -> dict[str, dict[str, Any]]:
        """Plain tables that `read_config` accepts and that JSON and TOML can represent."""
        return dataclasses.asdict(self)


SECTIONS: Mapping[str, type[Section]] = {
    cls.section: cls
    for cls in (
        ClusterConfig, ModelConfig, ExpertsConfig, RouterConfig, ControllerConfig, TrainConfig, ServeConfig,
        SecurityConfig,
    )
}  # fmt: skip


def load_config(path_or_preset: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads a TOML file, or a preset by its name, and applies overrides.

    overrides: "section.key" (or "section.table.key") -> value; None means not given.
    Raises ConfigError for an unknown file or preset, for invalid TOML, and for a wrong key, type or value.
    """
    source, text = _read_source(path_or_preset)
    try:
        tables = tomllib.loads(text)
    except ValueError as error:  # also a number of thousands of digits
        raise ConfigError(f"{source}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: not valid TOML: nested too deeply") from error
    return read_config(override(tables, overrides or {}), source=source)


def read_config(tables: Mapping[str, Any], *, source: str = "settings") -> Config:
    """Makes a Config from tables as parsed from TOML; `source` is the prefix of every error."""
    try:
        refuse_retired(tables)
        for name, table in tables.items():
            if name not in SECTIONS:
                raise ConfigError(f"[{name}]: unknown section; {suggest(name, SECTIONS)}")
            if not isinstance(table, Mapping):
                raise ConfigError(f"{name}: got {table!r}, expected a section [{name}]")
        return Config(**{name: read_section(SECTIONS[name], table) for name, table in tables.items()})  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def parse_override(text: str) -> tuple[str, Any]:
    """'train.steps=100' -> ("train.steps", 100). The value is parsed as TOML; if it is not TOML, it is a string."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f'override: got "{text}", expected section.key=value, for example train.steps=100')
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return key.strip(), value.strip()


def preset_names() -> tuple[str, ...]:
    """Names of the presets that come with the package."""
    folder = resources.files("moecluster.config") / "presets"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def _read_source(path_or_preset: str) -> tuple[str, str]:
    """(name of the source for error messages, its text)."""
    if path_or_preset in preset_names():
        file = resources.files("moecluster.config") / "presets" / f"{path_or_preset}.toml"
        return f"preset {path_or_preset}", file.read_text(encoding="utf-8")
    path = Path(path_or_preset)
    if not path.is_file():
        hint = suggest(path_or_preset, preset_names())
        raise ConfigError(f'"{path_or_preset}": no such file or preset; {hint} (presets: {", ".join(preset_names())})')
    try:
        return path_or_preset, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path_or_preset}: cannot be read as text: {error}") from error


def override(tables: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tables with the overrides ("section.key" -> value) applied; None means not given."""
    merged = dict(tables)
    for dotted, value in overrides.items():
        if value is None:
            continue
        *path, key = dotted.split(".")
        if not 1 <= len(path) <= 2:
            raise ConfigError(f'override: got "{dotted}", expected section.key; sections: {", ".join(SECTIONS)}')
        table = merged
        for name in path:
            inner = table.get(name, {})
            if not isinstance(inner, Mapping):
                raise ConfigError(f"{dotted}: {name} is not a table, expected section.key or section.table.key")
            table[name] = dict(inner)
            table = table[name]
        table[key] = value
    return merged
