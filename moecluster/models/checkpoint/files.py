"""The files of one checkpoint directory, on this host or (rpc/checkpoint/client.py) on another."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from moecluster.errors import CheckpointError
from moecluster.models.checkpoint.checksums import PIECE_BYTES

Seen = Callable[[memoryview], None]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")
# The other files of a model: config, tokenizer, chat template. Weights in other formats are ignored.
METADATA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(\.json|\.jsonl|\.txt|\.jinja|\.model|\.tiktoken|\.spm)")


TRAINING_FOLDER = "training"  # in a checkpoint: the files that only training needs


class CheckpointFiles(Protocol):
    """Reads weights by file name and offset. All other files are in a local directory. Thread-safe."""

    path: Path  # as the user named it, for errors
    metadata: Path  # a local directory with config.json, the index of the shards, the tokenizer files, training/*.json

    def weights(self) -> Mapping[str, int]:
        """Returns the names of the safetensors files, with their sizes in bytes."""

    def optimizer_files(self) -> Mapping[str, int]:
        """Returns the names of the safetensors files in training/, with that folder, and their sizes in bytes."""

    def read_into(self, name: str, begin: int, out: memoryview, seen: Seen | None = None) -> None:
        """Fills `out` with the file's bytes from offset `begin`. Raises CheckpointError if the file is too short.

        seen: called with the bytes in order, soon after each read. An exception from it ends the reading.
        """


class FolderFiles:
    """The safetensors files of a local directory. Keeps no file open between reads.

    A file that was replaced since it was first seen is refused, since earlier offsets are wrong for it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = self.metadata = Path(path)
        self._first_seen: dict[str, tuple[int, ...]] = {}  # file name -> its identity

    def weights(self) -> Mapping[str, int]:
        return self._sizes("")

    def optimizer_files(self) -> Mapping[str, int]:
        folder = f"{TRAINING_FOLDER}/"
        return self._sizes(folder) if os.path.isdir(self.path / folder) else {}

    def _sizes(self, folder: str) -> Mapping[str, int]:
        """folder: within the directory, with a slash behind it; empty: the directory."""
        sizes = {}
        try:
            for file in (self.path / folder).iterdir():
                if WEIGHTS_NAME.fullmatch(file.name) and file.is_file():
                    status = file.stat()
                    self._first_seen.setdefault(f"{folder}{file.name}", _identity(status))
                    sizes[f"{folder}{file.name}"] = status.st_size
        except OSError as error:
            raise CheckpointError(f"{self.path / folder} cannot be read: {error.strerror}") from error
        return sizes

    def read_into(self, name: str, begin: int, out: memoryview, seen: Seen | None = None) -> None:
        file = self.path / name
        try:
            with file.open("rb", buffering=0) as handle:
                identity = _identity(os.fstat(handle.fileno()))
                if self._first_seen.setdefault(name, identity) != identity:
                    raise CheckpointError(
                        f"{file} has changed since it was opened: write new weights to a directory of their own"
                    )
                handle.seek(begin)
                # One call reads at most 2 GiB. With `seen`, small pieces, which it finds in the CPU cache.
                while out and (count := handle.readinto(out if seen is None else out[:PIECE_BYTES])):
                    if seen is not None:
                        seen(out[:count])
                    out = out[count:]
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if out:
            raise CheckpointError(f"{file} is torn: it ends {len(out)} bytes too soon; copy it again")


class LocalFiles(FolderFiles):
    """The CheckpointFiles of a local model directory."""

    def __init__(self, path: str | Path) -> None:
        """Raises CheckpointError if the directory does not exist or has no config.json."""
        super().__init__(path)
        if not os.path.isdir(self.path):  # False for any path, unlike Path.is_dir
            raise CheckpointError(
                f"no model directory at {self.path}: give a directory with {CONFIG_NAME} and safetensors"
            )
        if not os.path.isfile(self.path / CONFIG_NAME):
            snapshots = sorted(self.path.glob(f"snapshots/*/{CONFIG_NAME}"))  # a download cache's directory
            right = str(snapshots[-1].parent) if snapshots else "the directory that save_pretrained wrote"
            raise CheckpointError(f"{self.path} has no {CONFIG_NAME}: give {right}")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
