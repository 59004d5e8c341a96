"""Reads a safetensors directory: locates each tensor, checks headers up front, and reads slices.

Opening reads headers only; nothing here unpickles. Bytes are read straight into their final buffer, not through mmap: a
mapped file would count as memory of the process while it is read. Tensors of another dtype, or quantized ones, are
converted in pieces while reading, so that there is never a second full copy.
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

CONVERTED_AT_ONCE = 2**18  # elements; small enough to stay in the CPU cache


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint directory. Thread-safe. Keeps no file open between reads."""

    files: CheckpointFiles
    tensors: Mapping[str, TensorInfo | Quantized]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens a directory on this host. Raises like `of`."""
        return cls.of(LocalFiles(path))

    @classmethod
    def of(cls, files: CheckpointFiles) -> Self:
        """Reads and checks the header of every shard. Raises CheckpointError or UnsupportedModelError with one clear
        line."""
        tensors = read_headers(files)
        return cls(files=files, tensors=quantized_tensors(files.path, _read_config(files), tensors))

    @property
    def path(self) -> Path:
        """The directory as the user named it; it may be on another host."""
        return self.files.path

    def info(self, key: str) -> TensorInfo | Quantized:
        """Returns the tensor's entry. Raises CheckpointError for an unknown key."""
        found = self.tensors.get(key)
        if found is None:
            raise CheckpointError(f"{self.path} has no tensor {key}")
        return found

    def config(self) -> Mapping[str, Any]:
        """Returns the content of config.json, without the family's defaults; empty if it is not a JSON object."""
        return _read_config(self.files)

    def text_config(self) -> Mapping[str, Any]:
        """Returns the language model's part of config.json in a multimodal checkpoint, else all of it."""
        config = self.config()
        text = config.get("text_config")
        return text if isinstance(text, dict) else config

    def read(self, key: str, row: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns the tensor, or only its slice [row : row + 1], without reading other rows. It owns its memory.

        dtype: None for that of the checkpoint, or float32 if the tensor is quantized.
        """
        info = self._readable(key)
        shape = info.shape if row is None else (1, *info.shape[1:])
        assert info.torch_dtype is not None
        tensor = empty_mapped(shape, dtype or info.torch_dtype)
        self.read_into(tensor, key, row)
        return tensor

    def read_stored(self, key: str) -> torch.Tensor:
        """Returns the tensor as `read` does, but also reads integers and booleans, which a trunk's buffers may be."""
        info = self.info(key)
        if not isinstance(info, TensorInfo) or info.dtype not in INTEGERS:
            return self.read(key)
        return self.read_as_is(info)

    def read_as_is(self, info: TensorInfo) -> torch.Tensor:
        """Returns a stored tensor of any dtype in STORED, without conversion."""
        tensor = torch.empty(info.shape, dtype=STORED[info.dtype])
        _Reading(self.files)(info, 0, tensor.view(-1).view(torch.uint8))
        return tensor

    def read_into(self, out: torch.Tensor, key: str, row: int | None = None) -> None:
        """Fills a contiguous CPU tensor of any float dtype that has the size of the tensor, or of one row."""
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
    """A ReadBytes that reads the parts of one tensor in order and verifies checksums where there are any."""

    def __init__(self, files: CheckpointFiles) -> None:
        self._files = files
        self._checks: dict[int, RunningCheck | None] = {}  # by TensorInfo.begin

    def __call__(self, info: TensorInfo, begin: int, out_bytes: torch.Tensor) -> None:
        check = self._checks.get(info.begin)
        if check is None or check.at != begin:
            check = self._checks[info.begin] = running_check(info.file, info.checksums, begin)
        content = out_bytes.numpy().data
        self._files.read_into(info.file.name, info.begin + begin, content, None if check is None else check.add)


OpenCheckpoint = Callable[[str], Checkpoint]  # raises CheckpointError for an unknown name


def open_checkpoint(path: str | Path, elsewhere: OpenCheckpoint | None) -> Checkpoint:
    """Opens a directory on this host or, if it is not here, through `elsewhere`. Raises like `of`.

    A directory without config.json, such as an empty mount point, counts as not here.
    """
    if elsewhere is not None and not os.path.isfile(os.path.join(path, CONFIG_NAME)):  # False for any string
        return elsewhere(str(path))
    return Checkpoint.open(path)


def _read_config(files: CheckpointFiles) -> Mapping[str, Any]:
    """Returns an empty mapping if config.json is not a JSON object: reading the model config reports that."""
    file = files.metadata / CONFIG_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
