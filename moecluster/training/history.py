"""The metrics of a run in a JSON Lines file, so that its loss curve survives restarts."""

from pathlib import Path
from typing import Self

from moecluster.errors import DataError
from moecluster.training.events import Evaluated, Event, Started, StepDone, decode_event, encode_event

FILE_NAME = "history.jsonl"


class History:
    """Metrics by step. A step that was repeated after a rollback has the metrics of its last run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started: Started | None = None
        self.steps: dict[int, StepDone] = {}
        self.evaluations: dict[int, Evaluated] = {}

    @classmethod
    def open(cls, output_dir: str | Path) -> Self:
        """Reads the file of an earlier part of the run, and drops an incomplete last line. Raises DataError."""
        history = cls(Path(output_dir) / FILE_NAME)
        if history.path.is_file():
            text = history.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                history.path.write_text(whole, encoding="utf-8")
            for number, line in enumerate(whole.splitlines(), start=1):
                try:
                    history._take(decode_event(line))
                except ValueError as error:
                    raise DataError(f"{history.path}, line {number}: not a record of a training run") from error
        return history

    def add(self, event: Event) -> None:
        """Records Started, StepDone and Evaluated events in memory and in the file; ignores other events."""
        if not isinstance(event, (Started, StepDone, Evaluated)):
            return
        self._take(event)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(encode_event(event) + "\n")

    def _take(self, event: Event) -> None:
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, StepDone):
            self.steps[event.step] = event
        elif isinstance(event, Evaluated):
            self.evaluations[event.step] = event
