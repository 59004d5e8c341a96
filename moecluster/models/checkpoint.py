"""A safetensors directory: which tensor stands in which file, checked up front, read slice by slice.

The file format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header size, a JSON header with dtype,
shape and byte range of every tensor, then the bytes. Opening reads headers only; nothing here unpickles.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open

from moecluster.errors import CheckpointError

CONFIG_NAME = "config.json"
SINGLE_FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own limit
_PLAIN_DTYPES = frozenset(("F64", "F32", "F16", "BF16"))


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a shard's header says of one tensor."""

    file: Path
    dtype: str  # the format's name: F32, BF16, ...
    shape: tuple[int, ...]
    num_bytes: int


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

    def read(self, key: str, row: int | None = None) -> torch.Tensor:
        """The tensor, or its slice [row : row + 1] without reading other rows. Owns its memory: no map stays open."""
        info = self.info(key)
        if info.dtype not in _PLAIN_DTYPES:
            raise CheckpointError(
                f"{key} in {info.file} is {info.dtype}: only float32, float16 and bfloat16 can be read"
            )
        with safe_open(str(info.file), framework="pt") as file:
            if row is None:
                tensor: torch.Tensor = file.get_tensor(key)
            else:
                assert 0 <= row < info.shape[0], f"row {row} of {key} with shape {info.shape}"
                tensor = file.get_slice(key)[row : row + 1]
            return tensor.clone()


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
            tensors = {key: _tensor_info(file, value) for key, value in entries.items()}
            announced = max((value["data_offsets"][1] for value in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{file} is torn: its safetensors header cannot be read; copy it again") from error
    if size != 8 + header_bytes + announced:
        raise CheckpointError(
            f"{file} is torn: {size} bytes where its header announces {8 + header_bytes + announced}; copy it again"
        )
    return tensors


def _tensor_info(file: Path, entry: Mapping[str, Any]) -> TensorInfo:
    begin, end = entry["data_offsets"]
    return TensorInfo(
        file=file,
        dtype=str(entry["dtype"]),
        shape=tuple(int(n) for n in entry["shape"]),
        num_bytes=int(end) - int(begin),
    )
