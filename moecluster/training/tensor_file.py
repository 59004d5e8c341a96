"""Writes a safetensors file incrementally: shapes first, then contents in any order, never all in memory.

The file format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header size, a JSON header with dtype,
shape and byte range of every tensor, then the bytes.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from moecluster.models.checkpoint.checksums import SummedHeader, sums_of
from moecluster.models.checkpoint.headers import STORED

DTYPE_NAMES = {dtype: name for name, dtype in STORED.items()}


class TensorFile:
    """Writes one file. Declared tensors that are never written are zeros. Disk errors are raised as OSError."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        *,
        by_row: Collection[str] = (),
    ) -> None:
        """Allocates the whole file first, so that a full disk fails before any tensor is written.

        by_row: tensors that are written, and later read, row by row.
        """
        self._shapes, self._dtypes = dict(shapes), dict(dtypes)
        self._begin: dict[str, int] = {}
        entries: dict[str, dict[str, object]] = {}
        end = 0
        for key, shape in shapes.items():
            begin, end = end, end + torch.Size(shape).numel() * dtypes[key].itemsize
            self._begin[key] = begin
            entries[key] = {"dtype": DTYPE_NAMES[dtypes[key]], "shape": list(shape), "data_offsets": [begin, end]}
        self._header = SummedHeader(entries, by_row)
        header = self._header.to_bytes()
        self._data_begin = len(header)
        self.content_bytes = end
        self._file = path.open("wb")
        try:
            os.posix_fallocate(self._file.fileno(), 0, self._data_begin + end)
            self._file.write(header)
        except OSError:
            self._file.close()
            raise

    def write(self, key: str, value: torch.Tensor, row: int = 0) -> None:
        """Writes a whole tensor, or the given row of it if the value has shape [1, ...]."""
        shape, dtype = self._shapes[key], self._dtypes[key]
        whole = tuple(value.shape) == shape
        assert whole or tuple(value.shape) == (1, *shape[1:]), f"{key}: {tuple(value.shape)} into {shape}"
        assert value.dtype == dtype, f"{key}: {value.dtype} into {dtype}"
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.seek(self._data_begin + self._begin[key] + (0 if whole else row * content.nbytes))
        self._file.write(content.data)
        if content.nbytes:
            self._header.set(key, sums_of(content.data, self._header.unit_bytes(key)), 0 if whole else row)

    def close(self) -> None:
        """Writes the header and syncs the file to disk."""
        try:
            header = self._header.to_bytes()
            assert len(header) == self._data_begin
            self._file.seek(0)
            self._file.write(header)
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
    """Writes in-memory tensors, which may share storage. Returns their total bytes."""
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    with TensorFile(path, shapes, {key: value.dtype for key, value in tensors.items()}) as file:
        for key, value in tensors.items():
            file.write(key, value)
        return file.content_bytes
