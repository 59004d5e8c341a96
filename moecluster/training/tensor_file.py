"""A safetensors file written piece by piece: shapes first, contents in any order, never all in memory.

The file format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header size, a JSON header with dtype,
shape and byte range of every tensor, then the bytes.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


class TensorFile:
    """Writes one file; tensors that were announced and never written are zeros. Errors of the disk are OSErrors."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> None:
        """Takes all the room at once, so that a full disk is found before anything is written."""
        self._shapes, self._dtypes = dict(shapes), dict(dtypes)
        self._begin: dict[str, int] = {}
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, shape in shapes.items():
            begin, end = end, end + torch.Size(shape).numel() * dtypes[key].itemsize
            self._begin[key] = begin
            entries[key] = {"dtype": DTYPE_NAMES[dtypes[key]], "shape": list(shape), "data_offsets": [begin, end]}
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        self._data_begin = 8 + len(header)
        self.content_bytes = end
        self._file = path.open("wb")
        try:
            os.posix_fallocate(self._file.fileno(), 0, self._data_begin + end)
            self._file.write(struct.pack("<Q", len(header)) + header)
        except OSError:
            self._file.close()
            raise

    def write(self, key: str, value: torch.Tensor, row: int = 0) -> None:
        """Writes a tensor; or, if it is a slice [1, ...] of what was announced, its row."""
        shape, dtype = self._shapes[key], self._dtypes[key]
        whole = tuple(value.shape) == shape
        assert whole or tuple(value.shape) == (1, *shape[1:]), f"{key}: {tuple(value.shape)} into {shape}"
        assert value.dtype == dtype, f"{key}: {value.dtype} into {dtype}"
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.seek(self._data_begin + self._begin[key] + (0 if whole else row * content.nbytes))
        self._file.write(content.data)

    def close(self) -> None:
        """Everything is on the disk afterwards."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """Writes tensors that are in memory; they may share it. Returns their bytes."""
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    with TensorFile(path, shapes, {key: value.dtype for key, value in tensors.items()}) as file:
        for key, value in tensors.items():
            file.write(key, value)
        return file.content_bytes
