"""The metrics of a run in a JSON Lines file, so that its loss curve survives restarts."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from moecluster.errors import DataError, ResourceError
from moecluster.training.events import Evaluated, Event, Started, StepDone, decode_event, encode_event

FILE_NAME = "history.jsonl"


class History:
    """Metrics by step. A step that was repeated after a rollback has the metrics of its last run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started: Started | None = None
        self.steps: dict[int, StepDone] = {}
        self.evaluations: dict[int, Evaluated] = {}
        self._unwritten = b""  # what found no room; the next line comes with it

    @classmethod
    def open(cls, output_dir: str | Path) -> Self:
        """Reads the file of an earlier part of the run, and drops an incomplete last line. Raises DataError."""
        history = cls(Path(output_dir) / FILE_NAME)
        if history.path.is_file():
            content = history.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                os.truncate(history.path, len(whole))
            for number, line in enumerate(whole.decode().splitlines(), start=1):
                try:
                    history._take(decode_event(line))
                except ValueError as error:
                    raise DataError(f"{history.path}, line {number}: not a record of a training run") from error
        return history

    def add(self, event: Event) -> None:
        """Records Started, StepDone and Evaluated events in memory and in the file; ignores other events.

        Raises ResourceError if the file cannot be written. It keeps its whole lines, and the next event brings what is
        missing.
        """
        if not isinstance(event, (Started, StepDone, Evaluated)):
            return
        self._take(event)
        self._unwritten += f"{encode_event(event)}\n".encode()
        try:
            self._append()
        except OSError as exc:
            raise ResourceError(
                f"{self.path}: the run's figures cannot be written ({exc.strerror}); free some space, or choose "
                "another train.output_dir"
            ) from exc
        self._unwritten = b""

    def _append(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                written = 0
                while written < len(self._unwritten):
                    written += file.write(self._unwritten[written:])
            except OSError:
                with suppress(OSError):  # no file, such as a pipe
                    file.truncate(end)
                raise

    def _take(self, event: Event) -> None:
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, StepDone):
            self.steps[event.step] = event
        elif isinstance(event, Evaluated):
            self.evaluations[event.step] = event
