"""The files of one checkpoint directory: of this host, or (rpc/checkpoint/client.py) of another."""

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
# What else belongs to a model: configuration, tokenizer, chat template. Weights in other formats are left alone.
METADATA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(\.json|\.jsonl|\.txt|\.jinja|\.model|\.tiktoken|\.spm)")


class CheckpointFiles(Protocol):
    """Weights by file name and offset; everything else in a local directory. Thread-safe."""

    path: Path  # as the user named it, for errors
    metadata: Path  # a directory here that has config.json, the index of the shards, the tokenizer's files

    def weights(self) -> Mapping[str, int]:
        """Names of the safetensors files, and their sizes in bytes."""

    def read_into(self, name: str, begin: int, out: memoryview, seen: Seen | None = None) -> None:
        """Fills out with the file's bytes from begin on. Raises CheckpointError if there are not so many.

        seen: is given the bytes in their order, soon after they came; what it raises ends the reading.
        """


class FolderFiles:
    """The safetensors files of a folder here. Holds no file open between reads; one that was written anew since it was
    first seen is refused, as offsets that were read before mean something else in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = self.metadata = Path(path)
        self._first_seen: dict[str, tuple[int, ...]] = {}  # file name -> which file it was

    def weights(self) -> Mapping[str, int]:
        try:
            found = [file for file in self.path.iterdir() if WEIGHTS_NAME.fullmatch(file.name) and file.is_file()]
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        sizes = {}
        for file in found:
            status = file.stat()
            self._first_seen.setdefault(file.name, _identity(status))
            sizes[file.name] = status.st_size
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
                # One call reads 2 GiB at most; what is seen, while it is in the processor's cache.
                while out and (count := handle.readinto(out if seen is None else out[:PIECE_BYTES])):
                    if seen is not None:
                        seen(out[:count])
                    out = out[count:]
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if out:
            raise CheckpointError(f"{file} is torn: it ends {len(out)} bytes too soon; copy it again")


class LocalFiles(FolderFiles):
    """CheckpointFiles of a model directory here."""

    def __init__(self, path: str | Path) -> None:
        """Raises CheckpointError if there is no such directory, or no model in it."""
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
