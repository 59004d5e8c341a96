"""A safetensors directory: which tensor stands in which file, checked up front, read slice by slice.

Opening reads headers only; nothing here unpickles. Bytes go from the file straight to where they stay: a mapped file
would count as memory of the process while it is read. What is stored in another dtype, or quantized, is converted piece
by piece on the way, so that there is never a second copy of it.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from moecluster.errors import CheckpointError
from moecluster.memory import empty_mapped
from moecluster.models.checkpoint.checksums import RunningCheck, running_check
from moecluster.models.checkpoint.files import CONFIG_NAME, CheckpointFiles, LocalFiles
from moecluster.models.checkpoint.headers import (
    INDEX_NAME,
    INTEGERS,
    SINGLE_FILE_NAME,
    STORED,
    TensorInfo,
    read_headers,
)
from moecluster.models.checkpoint.quantized import Quantized, quantized_tensors

__all__ = ["CONFIG_NAME", "INDEX_NAME", "SINGLE_FILE_NAME", "Checkpoint", "OpenCheckpoint", "open_checkpoint"]

CONVERTED_AT_ONCE = 2**18  # elements: they stay in the processor's cache


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint directory. Thread-safe; holds no file open between reads."""

    files: CheckpointFiles
    tensors: Mapping[str, TensorInfo | Quantized]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens a directory of this host. Raises as `of`."""
        return cls.of(LocalFiles(path))

    @classmethod
    def of(cls, files: CheckpointFiles) -> Self:
        """Reads and checks the header of every shard. Raises CheckpointError or UnsupportedModelError with one clear
        line."""
        tensors = read_headers(files)
        return cls(files=files, tensors=quantized_tensors(files.path, _read_config(files), tensors))

    @property
    def path(self) -> Path:
        """The directory as the user named it; of another host, maybe."""
        return self.files.path

    def info(self, key: str) -> TensorInfo | Quantized:
        """Raises CheckpointError for a key that is not there."""
        found = self.tensors.get(key)
        if found is None:
            raise CheckpointError(f"{self.path} has no tensor {key}")
        return found

    def config(self) -> Mapping[str, Any]:
        """What config.json says, defaults left out; nothing if it is no JSON object."""
        return _read_config(self.files)

    def text_config(self) -> Mapping[str, Any]:
        """The same, of the language model where the checkpoint is made of several."""
        config = self.config()
        text = config.get("text_config")
        return text if isinstance(text, dict) else config

    def read(self, key: str, row: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor, or its slice [row : row + 1] without reading other rows. Owns its memory.

        dtype: None for that of the checkpoint, or float32 for what is quantized.
        """
        info = self._readable(key)
        shape = info.shape if row is None else (1, *info.shape[1:])
        assert info.torch_dtype is not None
        tensor = empty_mapped(shape, dtype or info.torch_dtype)
        self.read_into(tensor, key, row)
        return tensor

    def read_stored(self, key: str) -> torch.Tensor:
        """The tensor as `read` gives it; integers and truth values, which a trunk's buffers may be, as they are."""
        info = self.info(key)
        if not isinstance(info, TensorInfo) or info.dtype not in INTEGERS:
            return self.read(key)
        return self.read_as_is(info)

    def read_as_is(self, info: TensorInfo) -> torch.Tensor:
        """A stored tensor of any dtype in STORED."""
        tensor = torch.empty(info.shape, dtype=STORED[info.dtype])
        _Reading(self.files)(info, 0, tensor.view(-1).view(torch.uint8))
        return tensor

    def read_into(self, out: torch.Tensor, key: str, row: int | None = None) -> None:
        """Fills a contiguous CPU tensor of any float dtype and the size of the tensor or of its one row."""
        info = self._readable(key)
        assert out.is_contiguous(), f"{key} into {out.stride()}"
        assert row is None or 0 <= row < info.shape[0], f"row {row} of {key} with shape {info.shape}"
        shape = info.shape if row is None else (1, *info.shape[1:])
        if not isinstance(info, TensorInfo):
            info.dequantise(out.view(shape), row, _Reading(self.files))
            return
        assert info.torch_dtype is not None
        num_bytes = info.num_bytes // (1 if row is None else info.shape[0])
        begin = 0 if row is None else row * num_bytes
        flat = out.view(-1)
        assert len(flat) * info.torch_dtype.itemsize == num_bytes, f"{num_bytes} bytes of {key} into {out.shape}"
        reading = _Reading(self.files)
        if out.dtype == info.torch_dtype:
            reading(info, begin, flat.view(torch.uint8))
            return
        stored = torch.empty(min(len(flat), CONVERTED_AT_ONCE), dtype=info.torch_dtype)
        for at in range(0, len(flat), CONVERTED_AT_ONCE):
            piece = stored[: len(flat) - at]
            reading(info, begin + at * stored.itemsize, piece.view(torch.uint8))
            flat[at : at + len(piece)].copy_(piece)

    def _readable(self, key: str) -> TensorInfo | Quantized:
        info = self.info(key)
        if info.torch_dtype is None:
            raise CheckpointError(
                f"{key} in {info.file} is {info.dtype}, without scales that config.json tells of: only float32, "
                "float16 and bfloat16 can be read, and block-scaled fp8 and mxfp4"
            )
        return info


class _Reading:
    """Reads one tensor, its parts in their order, and checks what is known of its bytes. A ReadBytes."""

    def __init__(self, files: CheckpointFiles) -> None:
        self._files = files
        self._checks: dict[int, RunningCheck | None] = {}  # by where a stored tensor begins

    def __call__(self, info: TensorInfo, begin: int, out_bytes: torch.Tensor) -> None:
        check = self._checks.get(info.begin)
        if check is None or check.at != begin:
            check = self._checks[info.begin] = running_check(info.file, info.checksums, begin)
        content = out_bytes.numpy().data
        self._files.read_into(info.file.name, info.begin + begin, content, None if check is None else check.add)


OpenCheckpoint = Callable[[str], Checkpoint]  # raises CheckpointError if there is none of that name


def open_checkpoint(path: str | Path, elsewhere: OpenCheckpoint | None) -> Checkpoint:
    """Opens a directory of this host, or, where this host does not see it, as elsewhere does. Raises as `of`.

    A directory without a configuration, as an empty mount point is one, is not seen.
    """
    if elsewhere is not None and not os.path.isfile(os.path.join(path, CONFIG_NAME)):  # False for any string
        return elsewhere(str(path))
    return Checkpoint.open(path)


def _read_config(files: CheckpointFiles) -> Mapping[str, Any]:
    """Nothing for what is no JSON object: its family's code says what is wrong with it."""
    file = files.metadata / CONFIG_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
