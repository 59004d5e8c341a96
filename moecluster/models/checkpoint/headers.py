"""Reads and checks the headers of a checkpoint's safetensors files.

The file format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header size, a JSON header with dtype,
shape and byte range of every tensor, then the bytes.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moecluster.errors import CheckpointError
from moecluster.hf.foreign import LFS_POINTER, read_object
from moecluster.models.checkpoint.checksums import METADATA, TensorChecksums, read_checksums
from moecluster.models.checkpoint.files import CheckpointFiles

SINGLE_FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own limit
_MAX_POINTER_BYTES = 1024
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
STORED = {
    **FLOATS, **INTEGERS,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor, as described by its shard's header."""

    file: Path
    dtype: str  # the format's name: F32, BF16, ...
    shape: tuple[int, ...]
    begin: int  # offset of its first byte in the file
    num_bytes: int
    checksums: TensorChecksums | None = None  # None: the file has none, since others wrote it

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for quantized formats and integers."""
        return FLOATS.get(self.dtype)


def read_headers(files: CheckpointFiles) -> dict[str, TensorInfo]:
    """Returns key -> tensor for all shards. Raises CheckpointError with one clear line."""
    weights = files.weights()
    tensors: dict[str, TensorInfo] = {}
    for name in _shards(files, weights):
        tensors.update(read_header(files, name, weights[name]))
    return tensors


def _shards(files: CheckpointFiles, weights: Mapping[str, int]) -> list[str]:
    """Returns the safetensors files that transformers would read: the single one, else those of the index.

    Does not check the index's single tensors: reading a missing one raises.
    """
    if SINGLE_FILE_NAME in weights:
        return [SINGLE_FILE_NAME]
    index = files.metadata / INDEX_NAME
    if index.exists():
        shards = sorted(set(_read_weight_map(index).values()))
        lost = [name for name in shards if name not in weights]
        if lost:
            raise CheckpointError(
                f"{files.path / INDEX_NAME} names {', '.join(lost)}, which is not in {files.path}: "
                "copy the missing shard"
            )
        return shards
    if any(files.metadata.glob("*.bin")):
        raise CheckpointError(
            f"{files.path} has pickled .bin weights only, which are never loaded: convert to safetensors"
        )
    raise CheckpointError(f"{files.path} has neither {SINGLE_FILE_NAME} nor {INDEX_NAME}")


def _read_weight_map(index: Path) -> dict[str, str]:
    content = read_object(index, "copy it again, with the shards beside it")
    try:
        weight_map, _ = content["weight_map"], content["metadata"]  # transformers needs both
    except KeyError as error:
        raise CheckpointError(f"{index} is torn: not a safetensors index with metadata and a weight_map") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} is torn: its weight_map does not map tensors to file names")
    foreign = [name for name in weight_map.values() if Path(name).name != name]
    if foreign:
        raise CheckpointError(f"{index} names {foreign[0]}: shards stand beside their index")
    return weight_map


def read_header(files: CheckpointFiles, name: str, size: int) -> dict[str, TensorInfo]:
    """Reads a shard's header. Raises CheckpointError unless it is readable and the file has exactly the announced
    size."""
    file = files.path / name
    if size < _MAX_POINTER_BYTES and _read(files, name, 0, size).startswith(LFS_POINTER):
        raise CheckpointError(f"{file} is a git-lfs pointer, not the weights that it stands for: run git lfs pull")
    header_bytes = struct.unpack("<Q", _read(files, name, 0, 8))[0] if size >= 8 else 0
    if not 2 <= header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(f"{file} is torn: its {size} bytes do not hold a safetensors header; copy it again")
    try:
        header: dict[str, Any] = json.loads(_read(files, name, 8, header_bytes))
        entries = {key: value for key, value in header.items() if key != METADATA}
        checksums = read_checksums(header)
        tensors = {
            key: _tensor_info(file, 8 + header_bytes, value, checksums.get(key)) for key, value in entries.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is torn: its safetensors header cannot be read; copy it again") from error
    announced = max((tensor.begin + tensor.num_bytes for tensor in tensors.values()), default=8 + header_bytes)
    if size != announced:
        raise CheckpointError(f"{file} is torn: {size} bytes where its header announces {announced}; copy it again")
    return tensors


def _read(files: CheckpointFiles, name: str, begin: int, num_bytes: int) -> bytes:
    content = bytearray(num_bytes)
    files.read_into(name, begin, memoryview(content))
    return bytes(content)


def _tensor_info(
    file: Path, data_begin: int, entry: Mapping[str, Any], checksums: TensorChecksums | None
) -> TensorInfo:
    """Raises ValueError or TypeError if the byte range does not match dtype and shape, or is none."""
    begin, end = (_integer(offset) for offset in entry["data_offsets"])
    info = TensorInfo(
        file=file,
        dtype=str(entry["dtype"]),
        shape=tuple(_integer(n) for n in entry["shape"]),
        begin=data_begin + begin,
        num_bytes=end - begin,
        checksums=checksums,
    )
    dtype = STORED.get(info.dtype)
    if not 0 <= begin <= end or min(info.shape, default=0) < 0:
        raise ValueError(f"bytes {begin} to {end} hold no tensor of shape {info.shape}")
    if dtype is not None and info.num_bytes != math.prod(info.shape) * dtype.itemsize:
        raise ValueError(f"bytes {begin} to {end} hold no {info.dtype} of shape {info.shape}")
    return info


def _integer(value: object) -> int:
    """Returns the value. Raises TypeError if it is no integer: JSON has floats, infinity and true, too."""
    if type(value) is not int:
        raise TypeError(f"{value!r} is no integer")
    return value
