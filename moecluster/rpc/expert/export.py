"""Copies tensors from one expert actor to another over gRPC, in chunks with checksums."""

import math
import zlib
from collections.abc import Iterable, Iterator

import grpc
import torch

from moecluster.errors import InvalidMessage, Unavailable
from moecluster.proto import expert_pb2
from moecluster.proto.expert_pb2_grpc import ExpertServiceStub
from moecluster.rpc import tensors
from moecluster.rpc.channels import is_connected_within
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert.interface import ExportedTensor, Pace
from moecluster.rpc.fields import decode_expert, encode_expert
from moecluster.rpc.server import open_channel
from moecluster.rpc.status_codes import from_rpc_error
from moecluster.types import ActorAddress, ExpertId

# Decoding a message holds the GIL while its bytes are copied: a millisecond for a chunk of this size.
CHUNK_BYTES = 2**20
MAX_TENSOR_BYTES = 16 * 2**30
DTYPES = (*tensors.ROW_DTYPES, torch.int64)
CONNECT_TIMEOUT_S = 2.0  # a single attempt gives up after 0.1 s, too little on a busy host


def go_on(num_bytes: int) -> None:
    """The Pace without a limit."""


def cut(tensor: ExportedTensor) -> Iterator[expert_pb2.ExportChunk]:
    """Yields the tensor's chunks in order, at least one. Copies one chunk's bytes at a time."""
    content = tensor.value.detach().contiguous().view(-1).view(torch.uint8).numpy().data
    for offset in range(0, max(len(content), 1), CHUNK_BYTES):
        chunk = bytes(content[offset : offset + CHUNK_BYTES])
        yield expert_pb2.ExportChunk(
            expert=encode_expert(tensor.expert),
            name=tensor.name,
            dtype=tensors.dtype_code(tensor.value.dtype),
            shape=tensor.value.shape,
            offset_bytes=offset,
            content=chunk,
            crc32=zlib.crc32(chunk),
            weight_version=tensor.weight_version,
        )


def assemble(
    chunks: Iterable[expert_pb2.ExportChunk], *, max_tensor_bytes: int = MAX_TENSOR_BYTES, pace: Pace = go_on
) -> Iterator[ExportedTensor]:
    """Assembles tensors from their chunks, which arrive in order. Calls pace with each chunk's size before the next.

    Raises InvalidMessage for a wrong checksum, a gap, another dtype or a size beyond max_tensor_bytes.
    """
    whole: _Whole | None = None
    for chunk in chunks:
        if zlib.crc32(chunk.content) != chunk.crc32:
            raise InvalidMessage("content", f"the checksum of {_where(chunk)} is wrong")
        whole = whole or _Whole(chunk, max_tensor_bytes)
        whole.add(chunk)
        pace(len(chunk.content))
        if whole.is_complete:
            yield whole.tensor()
            whole = None
    if whole is not None:
        raise InvalidMessage("content", "the last tensor is incomplete")


class _Whole:
    """One tensor being assembled chunk by chunk."""

    def __init__(self, first: expert_pb2.ExportChunk, max_bytes: int) -> None:
        where, self._shape = _where(first), tuple(first.shape)
        self._dtype = tensors.dtype_of(first.dtype)
        if self._dtype not in DTYPES:
            raise InvalidMessage("dtype", f"{self._dtype} of {where}")
        if min(self._shape, default=0) < 0:
            raise InvalidMessage("shape", f"{list(self._shape)} of {where}")
        if math.prod(max(size, 1) for size in self._shape) * self._dtype.itemsize > max_bytes:
            raise InvalidMessage("shape", f"{list(self._shape)} of {where} is too large, at most {max_bytes} bytes")
        self._first = first
        size_bytes = math.prod(self._shape) * self._dtype.itemsize
        self._content = torch.empty(size_bytes, dtype=torch.uint8)  # pages are allocated at the first write
        self._length_bytes = 0

    @property
    def is_complete(self) -> bool:
        return self._length_bytes == len(self._content)

    def add(self, chunk: expert_pb2.ExportChunk) -> None:
        where, begin = _where(self._first), self._length_bytes
        end = begin + len(chunk.content)
        if (_where(chunk), tuple(chunk.shape), chunk.dtype) != (where, self._shape, self._first.dtype):
            raise InvalidMessage("name", f"{_where(chunk)} amid {where}")
        if chunk.offset_bytes != begin:
            raise InvalidMessage("offset_bytes", f"{chunk.offset_bytes} of {where}, not {begin}")
        if end > len(self._content) or (begin == end and not self.is_complete):
            raise InvalidMessage("content", f"{end} bytes of {where}, not {len(self._content)}")
        self._content.numpy().data[begin:end] = chunk.content
        self._length_bytes = end

    def tensor(self) -> ExportedTensor:
        return ExportedTensor(
            expert=decode_expert(self._first.expert, "expert"),
            name=self._first.name,
            value=self._content.view(self._dtype).view(self._shape),
            weight_version=self._first.weight_version,
        )


def _where(chunk: expert_pb2.ExportChunk) -> str:
    return f"{chunk.expert.layer}/{chunk.expert.index} {chunk.name}"


class GrpcPeerExports:
    """PeerExports from one incarnation of an actor."""

    def __init__(self, peer: ActorAddress, *, credentials: ClusterCredentials | None = None) -> None:
        """Connects at the first call of tensors()."""
        self._peer = peer
        self._channel = open_channel(peer.address, credentials)
        self._stub = ExpertServiceStub(self._channel)
        self._is_connected = False

    def tensors(
        self, expert: ExpertId, *, weight_version: int = 0, max_tensor_bytes: int, timeout_s: float, pace: Pace
    ) -> Iterator[ExportedTensor]:
        request = expert_pb2.ExportRequest(
            experts=[encode_expert(expert)],
            incarnation=self._peer.incarnation,
            weight_version=weight_version,
        )
        try:
            if not self._is_connected:
                self._is_connected = is_connected_within(self._channel, min(CONNECT_TIMEOUT_S, timeout_s))
            if not self._is_connected:
                raise Unavailable(f"{self._peer.actor}: no connection within {CONNECT_TIMEOUT_S:g} s")
            call = self._stub.Export(request, timeout=timeout_s)
        except ValueError as exc:  # the channel was closed
            raise Unavailable(f"{self._peer.actor}: {exc}") from exc
        try:
            yield from assemble(call, max_tensor_bytes=max_tensor_bytes, pace=pace)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, self._peer.actor) from exc
        finally:
            call.cancel()  # a caller that stops early must not leave the peer sending

    def close(self) -> None:
        self._channel.close()
