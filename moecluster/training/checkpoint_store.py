"""The checkpoints in one directory. Each appears under its final name only when it is complete.

A checkpoint is written to a temporary directory, synced to disk, then renamed.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from moecluster.errors import CheckpointError

CHECKPOINTS = "checkpoints"  # where a run keeps them, below train.output_dir

_NAME = re.compile(r"step-(\d{8})")
_ASIDE = ".partial-"


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.root.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.root.iterdir() if entry.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def latest(self) -> Path | None:
        """The last complete checkpoint."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def write(self, step: int, fill: Callable[[Path], None]) -> Path:
        """Calls fill() with an empty directory, then publishes that directory as the step's checkpoint.

        Raises CheckpointError if writing fails; no partial checkpoint is left under the final name.
        """
        aside, final = self.root / f"{_ASIDE}{step:08d}", self.path(step)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            fill(aside)
            _sync_all(aside)
            if final.exists():  # the run rolled back to an earlier step
                self._discard(step)
            aside.rename(final)
            _sync(self.root)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.root}: {error.strerror or error}; "
                "free some space, or choose another train.output_dir"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return final

    def prune(self, keep: int) -> None:
        """Deletes all but the last `keep` complete checkpoints, and the temporary directories of interrupted runs."""
        for step in self.steps()[:-keep]:
            self._discard(step)
        for left in self.root.glob(f"{_ASIDE}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _discard(self, step: int) -> None:
        """Renames before deleting, so that a half-deleted checkpoint does not look complete."""
        doomed = self.path(step).rename(self.root / f"{_ASIDE}deleted-{step:08d}")
        shutil.rmtree(doomed, ignore_errors=True)


def _sync_all(directory: Path) -> None:
    """Calls fsync on the directory and on every file and directory below it."""
    for entry in sorted(directory.rglob("*"), reverse=True):
        _sync(entry)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
