"""Writes a trace line by line, safely appending to an existing one."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moecluster.errors import TraceError
from moecluster.simulation.trace.format import FORMAT, VERSION, TraceHeader, TraceWindow
from moecluster.simulation.trace.reader import read_header, read_window, refuse


class TraceWriter:
    """Writes a trace line by line, each at once: a crash of the process tears the last line at most.

    Appends to an existing file if it is a trace with the same header; a torn last line is cut off. Raises TraceError
    for any other file.
    """

    def __init__(self, path: str | Path, header: TraceHeader) -> None:
        self._header = header
        self._path = Path(path)
        self._time_s = -math.inf  # of the last window
        self._shift_s = 0.0
        whole = self._go_on() if self._path.is_file() and self._path.stat().st_size else 0
        try:
            self._file = self._path.open("ab", buffering=0)
            self._file.truncate(whole)
        except OSError as error:
            raise TraceError(f"{path}: cannot be written: {error.strerror}") from error
        self._whole = whole  # bytes of complete lines
        if not whole:
            fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(header)}
            self._write(fields)

    def add(self, window: TraceWindow) -> None:
        """Appends a window. Raises TraceError if it cannot be written; the file keeps its whole lines.

        One that is dated before the last, by a clock that was set or another controller's, is moved behind that one,
        and later ones as much.
        """
        if window.time_s + self._shift_s <= self._time_s:
            self._shift_s = self._time_s + self._header.window_s - window.time_s
        self._time_s = window.time_s + self._shift_s
        rows = zip(window.counts_LE, self._header.layers, strict=True)
        counts = [counts_E[: layer.experts].tolist() for counts_E, layer in rows]
        fields: dict[str, Any] = {"time_s": self._time_s, "counts": counts}
        if window.events:
            fields["events"] = [dataclasses.asdict(event) for event in window.events]
        self._write(fields)

    def close(self) -> None:
        """Syncs all lines to disk and closes the file. Raises TraceError."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise TraceError(f"{self._path}: cannot be written: {error.strerror}") from error
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _go_on(self) -> int:
        """Checks the existing file, and returns the bytes of its complete lines."""
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if not whole:
            refuse(self._path, 1, "is not a whole line; give another file to record to")
        lines = content[:whole].split(b"\n")[:-1]
        if read_header(self._path, lines[0] + b"\n") != self._header:
            refuse(self._path, 1, "is of another cluster or model; give another file to record to")
        if len(lines) > 1:
            self._time_s = read_window(self._path, len(lines), lines[-1] + b"\n", self._header, -math.inf).time_s
        return whole

    def _write(self, fields: Mapping[str, Any]) -> None:
        content = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            written = 0
            while written < len(content):
                written += self._file.write(content[written:])
        except OSError as error:
            self._file.truncate(self._whole)
            raise TraceError(
                f"{self._path}: cannot be written: {error.strerror}; what was recorded before is whole"
            ) from error
        self._whole += len(content)
