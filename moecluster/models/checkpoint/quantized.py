"""Quantized tensors of a checkpoint, seen as tensors of floats that are dequantised while they are read.

FP8 (DeepSeek-V3 and those that followed): `NAME` in float8_e4m3fn with `NAME_scale_inv`, a factor for every block of
`weight_block_size` rows and columns; the blocks at the edges may be smaller.
MXFP4 (gpt-oss): `NAME_blocks` [E, O, I/32, 16] with two 4-bit floats a byte, the lower half first, and `NAME_scales`
[E, O, I/32] with the exponent of 32 values; the model's `NAME` is [E, I, O].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moecluster.errors import CheckpointError, UnsupportedModelError
from moecluster.models.checkpoint.headers import STORED, TensorInfo

FP8_SCALE = "_scale_inv"
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"
MXFP4_BLOCK = 32  # values that share an exponent
PIECE_VALUES = 2**18  # dequantised at once: small enough to stay in the processor's cache, beside what it is made of

_FP8_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

ReadBytes = Callable[[TensorInfo, int, torch.Tensor], None]  # of a stored tensor, from a byte on, into uint8


@dataclass(frozen=True, kw_only=True)
class Quantized(ABC):
    """Two stored tensors that are one tensor of floats."""

    values: TensorInfo
    scales: TensorInfo

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the floats."""

    @abstractmethod
    def dequantise(self, out: torch.Tensor, row: int | None, read: ReadBytes) -> None:
        """Fills a contiguous tensor of any float dtype; row: only [row : row + 1] of the first dimension."""

    @property
    def dtype(self) -> str:
        """What the values are stored as."""
        return self.values.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """What it is dequantised to if nothing else is wanted."""
        return torch.float32

    @property
    def num_bytes(self) -> int:
        """In the checkpoint."""
        return self.values.num_bytes + self.scales.num_bytes

    @property
    def file(self) -> Path:
        return self.values.file


@dataclass(frozen=True, kw_only=True)
class Fp8Tensor(Quantized):
    """float8_e4m3fn [(E,) rows, columns], and a factor for each block."""

    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantise(self, out: torch.Tensor, row: int | None, read: ReadBytes) -> None:
        scale_RC = _read_stored(self.scales, row, read).to(torch.float32)
        rows, columns = self.shape[-2:]
        (block_rows, block_columns), flat = self.block, out.view(-1, columns)
        grid = -(-rows // block_rows)
        scale_RC = scale_RC.reshape(-1, -(-columns // block_columns))
        first_byte = 0 if row is None else row * rows * columns
        piece_rows = max(PIECE_VALUES // columns // block_rows, 1) * block_rows
        stored = torch.empty(min(piece_rows, rows) * columns, dtype=torch.uint8)
        for matrix in range(len(flat) // rows):
            for begin in range(0, rows, piece_rows):
                count = min(piece_rows, rows - begin)
                at = matrix * rows + begin
                piece = stored[: count * columns]
                read(self.values, first_byte + at * columns, piece)
                blocks = torch.arange(begin, begin + count) // block_rows + matrix * grid
                factor = scale_RC[blocks].repeat_interleave(block_columns, dim=1)[:, :columns]
                value = piece.view(torch.float8_e4m3fn).view(count, columns).to(torch.float32)
                flat[at : at + count].copy_(value.mul_(factor))


@dataclass(frozen=True, kw_only=True)
class Mxfp4Tensor(Quantized):
    """4-bit floats [E, O, I], seen as [E, I, O], and an exponent for every 32 of them along I."""

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, blocks, half = self.values.shape
        return experts, blocks * half * 2, rows

    @property
    def dtype(self) -> str:
        return "MXFP4"

    def dequantise(self, out: torch.Tensor, row: int | None, read: ReadBytes) -> None:
        experts, columns, rows = self.shape
        row_bytes = columns // 2
        piece_rows = max(PIECE_VALUES // columns, 1)
        stored = torch.empty(min(piece_rows, rows) * row_bytes, dtype=torch.uint8)
        positive = torch.tensor(_FP4_VALUES)
        values_16 = torch.cat([positive, -positive])
        # Both values of a byte at once: 256 pairs.
        pairs = torch.stack([values_16.repeat(16), values_16.repeat_interleave(16)], dim=1)
        for slot, expert in enumerate(range(experts) if row is None else (row,)):
            exponent = _read_stored(self.scales, expert, read).view(rows, -1).to(torch.int32) - 127
            for begin in range(0, rows, piece_rows):
                count = min(piece_rows, rows - begin)
                piece = stored[: count * row_bytes]
                read(self.values, (expert * rows + begin) * row_bytes, piece)
                value = pairs[piece.int()].view(count, -1, MXFP4_BLOCK)
                value = torch.ldexp(value, exponent[begin : begin + count, :, None])
                out[slot, :, begin : begin + count].copy_(value.view(count, columns).t())


def _read_stored(info: TensorInfo, row: int | None, read: ReadBytes) -> torch.Tensor:
    """A small stored tensor, or its row, in its own dtype."""
    dtype = STORED[info.dtype]
    shape = info.shape if row is None else info.shape[1:]
    content = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    read(info, 0 if row is None else row * len(content), content)
    return content.view(dtype).view(shape)


def quantized_tensors(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo | Quantized]:
    """The checkpoint's tensors as the model has them: values and scales that belong together are one tensor.

    Raises UnsupportedModelError for a quantization that is not read, CheckpointError for scales that do not fit.
    """
    settings = config.get("quantization_config") or {}
    method = quantization_method(directory, settings)
    if method == "fp8":
        return _fp8_tensors(directory, settings, tensors)
    return dict(tensors) if method is None else _mxfp4_tensors(directory, tensors)


def quantization_method(directory: str | Path, settings: Any) -> str | None:
    """What a quantization_config says: fp8, mxfp4, or None for nothing. Raises UnsupportedModelError for the others."""
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method in ("fp8", "mxfp4"):
        return str(method)
    raise UnsupportedModelError(
        f"{directory} is quantized by {method!r}: give a checkpoint in float32, bfloat16 or float16, or one with block-"
        "scaled fp8 or mxfp4 weights, which are dequantised when they are loaded"
    )


def _fp8_tensors(
    directory: Path, settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo | Quantized]:
    found: dict[str, TensorInfo | Quantized] = {}
    for key, info in tensors.items():
        scales = tensors.get(f"{key}{FP8_SCALE}")
        if key.endswith(FP8_SCALE) and key.removesuffix(FP8_SCALE) in tensors:
            continue
        if info.dtype != "F8_E4M3" or scales is None:
            found[key] = info
            continue
        block = _fp8_block(settings.get("weight_block_size"), info)
        grid = tuple(-(-size // part) for size, part in zip(info.shape[-2:], block, strict=True))
        expected = (*info.shape[:-2], *grid)
        fits = len(info.shape) in (2, 3) and math.prod(scales.shape) == math.prod(expected)
        if not fits or scales.dtype not in _FP8_SCALES:
            raise CheckpointError(
                f"{key}{FP8_SCALE} in {directory} is {scales.dtype} {list(scales.shape)}: {list(expected)} expected "
                f"for a weight {list(info.shape)} in blocks of {list(block)}"
            )
        found[key] = Fp8Tensor(values=info, scales=scales, block=block)
    return found


def _fp8_block(size: Any, info: TensorInfo) -> tuple[int, int]:
    """Rows and columns that share a factor; all of them where the settings name no blocks."""
    if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    rows, columns = info.shape[-2:] if len(info.shape) >= 2 else (1, 1)
    return max(rows, 1), max(columns, 1)


def _mxfp4_tensors(directory: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo | Quantized]:
    found: dict[str, TensorInfo | Quantized] = {}
    for key, info in tensors.items():
        name = key.removesuffix(MXFP4_BLOCKS)
        if key.endswith(MXFP4_SCALES) and f"{key.removesuffix(MXFP4_SCALES)}{MXFP4_BLOCKS}" in tensors:
            continue
        if not key.endswith(MXFP4_BLOCKS) or info.dtype != "U8":
            found[key] = info
            continue
        scales = tensors.get(f"{name}{MXFP4_SCALES}")
        if (
            scales is None
            or scales.dtype != "U8"
            or len(info.shape) != 4
            or info.shape[-1] != MXFP4_BLOCK // 2
            or scales.shape != info.shape[:-1]
        ):
            raise CheckpointError(
                f"{name} in {directory} cannot be dequantised: blocks {list(info.shape)}, scales "
                f"{list(scales.shape) if scales else 'missing'}; [E, O, I/32, 16] and [E, O, I/32] of bytes expected"
            )
        found[name] = Mxfp4Tensor(values=info, scales=scales)
    return found
