"""Reads a trace strictly: every error is one line that names the file and line, and mostly the field."""

import json
import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from moecluster.errors import TraceError
from moecluster.simulation.trace.format import (
    EVENT_KINDS,
    FORMAT,
    MOST_TOKENS,
    VERSION,
    TraceActor,
    TraceEvent,
    TraceHeader,
    TraceLayer,
    TraceWindow,
)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A trace file, whose windows are read lazily."""

    path: Path
    header: TraceHeader

    def windows(self) -> Iterator[TraceWindow]:
        """Yields the windows in order. Raises TraceError at the first malformed line."""
        time_s = -math.inf
        with self.path.open("rb") as file:
            file.readline()
            number = 1
            for number, line in enumerate(file, start=2):
                window = read_window(self.path, number, line, self.header, time_s)
                time_s = window.time_s
                yield window
        if number == 1:
            refuse(self.path, 2, "there is no window; record for longer than window_s")


def open_trace(path: str | Path) -> Trace:
    """Reads the first line of a trace. Raises TraceError, which names file and line."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            first = file.readline()
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from error
    return Trace(path=path, header=read_header(path, first))


def refuse(path: Path, line: int, what: str) -> NoReturn:
    """Raises TraceError for a line of a file."""
    raise TraceError(f"{path}, line {line}: {what}")


class _Line:
    """One line of a trace with strict field readers, which raise TraceError naming file, line and field."""

    def __init__(self, path: Path, number: int, raw: bytes) -> None:
        self._path, self._number = path, number
        if not raw.endswith(b"\n"):
            self.refuse("is torn: it has no end, so the recording was cut there; remove this line")
        try:
            fields = json.loads(raw, parse_constant=self._not_a_number)
        except TraceError:
            raise
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{path}, line {number}: is no JSON: {error}") from error
        self.fields = self.object(fields, "the line")

    def refuse(self, what: str) -> NoReturn:
        refuse(self._path, self._number, what)

    def object(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.refuse(f"{name}: got {_shown(value)}, expected an object")
        return value

    def list(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            self.refuse(f"{name}: got {_shown(value)}, expected a list")
        return value

    def keys(
        self, fields: dict[str, Any], name: str, needed: AbstractSet[str], optional: AbstractSet[str] = frozenset()
    ) -> None:
        if missing := sorted(needed - fields.keys()):
            self.refuse(f"{name}: {missing[0]} is missing")
        if unknown := sorted(fields.keys() - needed - optional):
            self.refuse(f"{name}: unknown field {unknown[0]}; there are {', '.join(sorted(needed | optional))}")

    def text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            self.refuse(f"{name}: got {_shown(value)}, expected a string")
        return value

    def integer(self, value: Any, name: str, least: int) -> int:
        if type(value) is not int or not least <= value <= MOST_TOKENS:
            self.refuse(f"{name}: got {_shown(value)}, expected a whole number of at least {least}")
        return value

    def number(self, value: Any, name: str) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            self.refuse(f"{name}: got {_shown(value)}, expected a number")
        return float(value)

    def positive(self, value: Any, name: str) -> float:
        number = self.number(value, name)
        if number <= 0:
            self.refuse(f"{name}: got {_shown(value)}, expected more than 0")
        return number

    def _not_a_number(self, name: str) -> NoReturn:
        self.refuse(f"got {name}, expected only finite numbers")


def read_header(path: Path, raw: bytes) -> TraceHeader:
    """Returns the header from the first line of a trace."""
    if not raw.strip():
        refuse(path, 1, f"is empty, expected the first line of a {FORMAT}")
    line = _Line(path, 1, raw)
    if line.fields.get("format") != FORMAT:
        line.refuse(f'is not the first line of a trace: "format" is not "{FORMAT}"')
    if line.fields.get("version") != VERSION:
        line.refuse(f"version: got {_shown(line.fields.get('version'))}, and this moecluster reads version {VERSION}")
    line.keys(line.fields, "the first line", {"format", "version", "model", "window_s", "layers", "actors"})
    layers, actors = _read_layers(line), _read_actors(line)
    if not layers or not actors:
        line.refuse("there are no layers or no actors")
    return TraceHeader(
        model=line.text(line.fields["model"], "model"),
        window_s=line.positive(line.fields["window_s"], "window_s"),
        layers=layers,
        actors=actors,
    )


def _read_layers(line: _Line) -> tuple[TraceLayer, ...]:
    layers: list[TraceLayer] = []
    for entry in line.list(line.fields["layers"], "layers"):
        fields = line.object(entry, "layers")
        line.keys(fields, "layers", {"layer", "experts", "expert_bytes"})
        layer = TraceLayer(
            layer=line.integer(fields["layer"], "layers.layer", 0),
            experts=line.integer(fields["experts"], "layers.experts", 1),
            expert_bytes=line.integer(fields["expert_bytes"], "layers.expert_bytes", 0),
        )
        if layers and layer.layer <= layers[-1].layer:
            line.refuse(f"layers: layer {layer.layer} after {layers[-1].layer}, expected ascending ones")
        layers.append(layer)
    return tuple(layers)


def _read_actors(line: _Line) -> tuple[TraceActor, ...]:
    actors: dict[str, TraceActor] = {}
    for entry in line.list(line.fields["actors"], "actors"):
        fields = line.object(entry, "actors")
        line.keys(fields, "actors", {"name", "slots", "speed", "node"})
        actor = TraceActor(
            name=line.text(fields["name"], "actors.name"),
            slots=line.integer(fields["slots"], "actors.slots", 0),
            speed=line.positive(fields["speed"], "actors.speed"),
            node=line.text(fields["node"], "actors.node"),
        )
        if actor.name in actors:
            line.refuse(f"actors: {actor.name} is named twice")
        actors[actor.name] = actor
    return tuple(actors.values())


def read_window(path: Path, number: int, raw: bytes, header: TraceHeader, after_s: float) -> TraceWindow:
    """Returns the window of a later line, whose time must be after after_s."""
    line = _Line(path, number, raw)
    line.keys(line.fields, "the window", {"time_s", "counts"}, {"events"})
    time_s = line.number(line.fields["time_s"], "time_s")
    if time_s <= after_s:
        line.refuse(f"time_s: got {time_s:g} after {after_s:g}, expected windows in the order of time")
    rows = line.list(line.fields["counts"], "counts")
    if len(rows) != len(header.layers):
        line.refuse(f"counts: got {len(rows)} layers, expected {len(header.layers)} as in the first line")
    counts_LE = np.zeros((len(rows), max(layer.experts for layer in header.layers)), dtype=np.int64)
    for position, (row, layer) in enumerate(zip(rows, header.layers, strict=True)):
        counts = line.list(row, f"counts of layer {layer.layer}")
        if len(counts) != layer.experts:
            line.refuse(f"counts of layer {layer.layer}: got {len(counts)} experts, expected {layer.experts}")
        for count in counts:
            if type(count) is not int or not 0 <= count <= MOST_TOKENS:
                line.integer(count, f"counts of layer {layer.layer}", 0)
        counts_LE[position, : layer.experts] = counts
    return TraceWindow(time_s=time_s, counts_LE=counts_LE, events=_read_events(line, header))


def _read_events(line: _Line, header: TraceHeader) -> tuple[TraceEvent, ...]:
    events = []
    for entry in line.list(line.fields.get("events", []), "events"):
        fields = line.object(entry, "events")
        line.keys(fields, "events", {"kind", "actor"})
        if fields["kind"] not in EVENT_KINDS:
            line.refuse(f"events.kind: got {_shown(fields['kind'])}, expected {' or '.join(EVENT_KINDS)}")
        if fields["actor"] not in [actor.name for actor in header.actors]:
            line.refuse(f"events.actor: got {_shown(fields['actor'])}, which is no actor of the first line")
        events.append(TraceEvent(kind=fields["kind"], actor=fields["actor"]))
    return tuple(events)


def _shown(value: Any) -> str:
    """Returns a value for an error message, short enough for one line."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
