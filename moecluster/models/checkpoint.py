"""A safetensors directory: which tensor stands in which file, checked up front, read slice by slice.

The file format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header size, a JSON header with dtype,
shape and byte range of every tensor, then the bytes. Opening reads headers only; nothing here unpickles. Bytes go from
the file straight to where they stay: a mapped file would count as memory of the process while it is read.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from moecluster.errors import CheckpointError

CONFIG_NAME = "config.json"
SINGLE_FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own limit
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a shard's header says of one tensor."""

    file: Path
    dtype: str  # the format's name: F32, BF16, ...
    shape: tuple[int, ...]
    begin: int  # of its first byte in the file
    num_bytes: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for quantized formats and integers."""
        return _DTYPES.get(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint directory. Holds no file open between reads."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Reads and checks the header of every shard. Raises CheckpointError with one clear line."""
        directory = Path(path)
        if not directory.is_dir():
            raise CheckpointError(
                f"no model directory at {directory}: give a directory with {CONFIG_NAME} and safetensors"
            )
        if not (directory / CONFIG_NAME).is_file():
            raise CheckpointError(f"{directory} has no {CONFIG_NAME}: give the directory that save_pretrained wrote")
        tensors: dict[str, TensorInfo] = {}
        for file in _shards(directory):
            tensors.update(_read_header(file))
        _check_index(directory, tensors)
        return cls(path=directory, tensors=tensors)

    def info(self, key: str) -> TensorInfo:
        """Raises CheckpointError for a key that is not there."""
        found = self.tensors.get(key)
        if found is None:
            raise CheckpointError(f"{self.path} has no tensor {key}")
        return found

    def config(self) -> Mapping[str, Any]:
        """What config.json says, defaults left out; nothing if it is no JSON object."""
        try:
            content = json.loads((self.path / CONFIG_NAME).read_text(encoding="utf-8"))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def read(self, key: str, row: int | None = None) -> torch.Tensor:
        """The tensor, or its slice [row : row + 1] without reading other rows. Owns its memory."""
        info = self._readable(key)
        shape = info.shape if row is None else (1, *info.shape[1:])
        tensor = torch.empty(shape, dtype=info.torch_dtype)
        self.read_into(tensor, key, row)
        return tensor

    def read_into(self, out: torch.Tensor, key: str, row: int | None = None) -> None:
        """Fills a contiguous CPU tensor, of the stored dtype and the size of the tensor or of its one row."""
        info = self._readable(key)
        assert out.is_contiguous() and out.dtype == info.torch_dtype, f"{key} into {out.dtype}, {out.stride()}"
        begin, num_bytes = info.begin, info.num_bytes
        if row is not None:
            assert 0 <= row < info.shape[0], f"row {row} of {key} with shape {info.shape}"
            num_bytes //= info.shape[0]
            begin += row * num_bytes
        assert out.nbytes == num_bytes, f"{num_bytes} bytes of {key} into {out.nbytes}"
        left = out.view(-1).view(torch.uint8).numpy().data
        try:
            with info.file.open("rb", buffering=0) as file:
                file.seek(begin)
                while left and (count := file.readinto(left)):  # one call reads 2 GiB at most
                    left = left[count:]
        except OSError as error:
            raise CheckpointError(f"{info.file} cannot be read: {error}") from error
        if left:
            raise CheckpointError(f"{info.file} is torn: it ends within {key}; copy it again")

    def _readable(self, key: str) -> TensorInfo:
        info = self.info(key)
        if info.torch_dtype is None:
            raise CheckpointError(
                f"{key} in {info.file} is {info.dtype}: only float32, float16 and bfloat16 can be read"
            )
        return info


def _shards(directory: Path) -> list[Path]:
    """The safetensors files of a directory: those of the index, or the single one."""
    index = directory / INDEX_NAME
    if index.is_file():
        shards = [directory / name for name in sorted(set(_read_weight_map(index).values()))]
        lost = [shard.name for shard in shards if not shard.is_file()]
        if lost:
            raise CheckpointError(
                f"{index} names {', '.join(lost)}, which is not in {directory}: copy the missing shard"
            )
        return shards
    single = directory / SINGLE_FILE_NAME
    if single.is_file():
        return [single]
    if any(directory.glob("*.bin")):
        raise CheckpointError(
            f"{directory} has pickled .bin weights only, which are never loaded: convert to safetensors"
        )
    raise CheckpointError(f"{directory} has neither {SINGLE_FILE_NAME} nor {INDEX_NAME}")


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text())
        weight_map, _ = content["weight_map"], content["metadata"]  # transformers cannot do without either
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is torn: not a safetensors index with metadata and a weight_map") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} is torn: its weight_map does not map tensors to file names")
    foreign = [name for name in weight_map.values() if Path(name).name != name]
    if foreign:
        raise CheckpointError(f"{index} names {foreign[0]}: shards stand beside their index")
    return weight_map


def _check_index(directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
    index = directory / INDEX_NAME
    if not index.is_file():
        return
    lost = sorted(key for key, name in _read_weight_map(index).items() if key not in tensors)
    if lost:
        raise CheckpointError(f"{index} names {lost[0]}, which is in none of its shards ({len(lost)} such tensors)")


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Checks that a shard is whole: a header that can be read, and exactly the bytes that it announces."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{file} is torn: its {size} bytes do not hold a safetensors header; copy it again")
        try:
            header: dict[str, Any] = json.loads(handle.read(header_bytes))
            entries = {key: value for key, value in header.items() if key != "__metadata__"}
            tensors = {key: _tensor_info(file, 8 + header_bytes, value) for key, value in entries.items()}
            announced = max((value["data_offsets"][1] for value in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{file} is torn: its safetensors header cannot be read; copy it again") from error
    if size != 8 + header_bytes + announced:
        raise CheckpointError(
            f"{file} is torn: {size} bytes where its header announces {8 + header_bytes + announced}; copy it again"
        )
    return tensors


def _tensor_info(file: Path, data_begin: int, entry: Mapping[str, Any]) -> TensorInfo:
    """Raises ValueError for a byte range that does not hold the shape."""
    begin, end = (int(offset) for offset in entry["data_offsets"])
    info = TensorInfo(
        file=file,
        dtype=str(entry["dtype"]),
        shape=tuple(int(n) for n in entry["shape"]),
        begin=data_begin + begin,
        num_bytes=end - begin,
    )
    if begin < 0 or (
        info.torch_dtype is not None and info.num_bytes != math.prod(info.shape) * info.torch_dtype.itemsize
    ):
        raise ValueError(f"bytes {begin} to {end} hold no {info.dtype} of shape {info.shape}")
    return info
