"""Encodes and decodes tensors: bytes inline, or a region of shared memory."""

import math
import warnings
from collections.abc import Mapping

import torch

from moecluster.errors import InvalidMessage
from moecluster.proto import tensor_pb2
from moecluster.rpc.same_host.segment import PeerSegment, Region, Segment

MAX_ROWS = 2**20


MAX_WIDTH = 2**17


_DTYPES: Mapping[tensor_pb2.DType, torch.dtype] = {
    tensor_pb2.FLOAT32: torch.float32,
    tensor_pb2.BFLOAT16: torch.bfloat16,
    tensor_pb2.FLOAT16: torch.float16,
    tensor_pb2.INT32: torch.int32,
    tensor_pb2.INT64: torch.int64,
}


_CODES = {dtype: code for code, dtype in _DTYPES.items()}


ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_code(dtype: torch.dtype) -> tensor_pb2.DType:
    """The wire code of a supported dtype."""
    return _CODES[dtype]


def expect_read_only_views() -> None:
    """Consumes torch's one-time warning about read-only memory: received tensors are read in place, never written.

    Call it at the start of a process that receives tensors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


def dtype_of(code: tensor_pb2.DType) -> torch.dtype:
    """The dtype of a wire code. Raises InvalidMessage for an unknown one."""
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise InvalidMessage("dtype", f"{code} is unknown")
    return dtype


def tensor_bytes(value: torch.Tensor) -> bytes:
    """A CPU tensor's elements, row-major and little-endian."""
    value = value.detach()
    # NumPy has no bfloat16; its bits are the same as an int16's.
    return (value.view(torch.int16) if value.dtype is torch.bfloat16 else value).numpy().tobytes()


def encode_tensor(value: torch.Tensor, segment: Segment | None = None) -> tensor_pb2.Tensor:
    """Encodes a tensor: through the segment if given and it has room, inline otherwise."""
    value = value.detach()
    region = segment.write(value) if segment is not None else None
    if region is None:
        return tensor_pb2.Tensor(dtype=_CODES[value.dtype], shape=value.shape, inline=tensor_bytes(value))
    return tensor_pb2.Tensor(
        dtype=_CODES[value.dtype],
        shape=value.shape,
        region=tensor_pb2.Region(offset=region.offset, length_bytes=region.length_bytes, sequence=region.sequence),
    )


def region_of(message: tensor_pb2.Tensor) -> Region | None:
    """The tensor's region in the sender's segment; None if it is inline."""
    if message.WhichOneof("content") != "region":
        return None
    region = message.region
    return Region(offset=region.offset, length_bytes=region.length_bytes, sequence=region.sequence)


def decode_tensor(
    message: tensor_pb2.Tensor,
    field: str,
    *,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    peer: PeerSegment | None = None,
) -> torch.Tensor:
    """Decodes a tensor as a view: do not write to it, and do not use it after its region is released.

    shape: the required size of each dimension; None allows any. Raises InvalidMessage, naming the field.
    """
    dtype = _DTYPES.get(message.dtype)
    if dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InvalidMessage(
            f"{field}.dtype", f"{tensor_pb2.DType.Name(message.dtype) if dtype else message.dtype}, not {wanted}"
        )
    assert dtype is not None
    got = tuple(message.shape)
    if len(got) != len(shape) or any(w is not None and w != g for w, g in zip(shape, got, strict=False)):
        raise InvalidMessage(f"{field}.shape", f"{list(got)}, not {['any' if w is None else w for w in shape]}")
    if min(got, default=0) < 0 or any(size > limit for size, limit in zip(got, (MAX_ROWS, MAX_WIDTH), strict=False)):
        raise InvalidMessage(f"{field}.shape", f"{list(got)} is out of range, at most {MAX_ROWS} rows of {MAX_WIDTH}")
    length_bytes = math.prod(got) * dtype.itemsize
    region = region_of(message)
    if region is not None:
        if peer is None:
            raise InvalidMessage(f"{field}.region", "no segment was agreed on")
        if region.length_bytes != length_bytes:
            raise InvalidMessage(f"{field}.region", f"{region.length_bytes} bytes, not {length_bytes}")
        return peer.view(region, dtype, got)
    if len(message.inline) != length_bytes:
        raise InvalidMessage(f"{field}.inline", f"{len(message.inline)} bytes, not {length_bytes}")
    if not length_bytes:
        return torch.empty(got, dtype=dtype)
    flat = torch.frombuffer(message.inline, dtype=dtype)
    return flat if len(got) == 1 else flat.view(got)
