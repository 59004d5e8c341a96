"""Tensors cut into chunks and reassembled, and malformed chunks."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from moecluster.errors import InvalidMessage
from moecluster.proto import expert_pb2, tensor_pb2
from moecluster.rpc.expert import export
from moecluster.rpc.expert.interface import ExportedTensor
from moecluster.types import ExpertId
from tests.support.expert.batches import assert_same_fields


def chunk(
    content: bytes, *, offset_bytes: int = 0, shape: Sequence[int] = (4,), name: str = "w", **changes: int
) -> expert_pb2.ExportChunk:
    dtype: Any = changes.get("dtype", tensor_pb2.FLOAT32)  # the wire carries any number
    return expert_pb2.ExportChunk(
        expert=tensor_pb2.ExpertRef(layer=1, index=2),
        name=name,
        dtype=dtype,
        shape=shape,
        offset_bytes=offset_bytes,
        content=content,
        crc32=changes.get("crc32", zlib.crc32(content)),
    )


@pytest.mark.parametrize("chunk_bytes", [1, 5, 2**20])
@pytest.mark.parametrize(
    "value",
    [
        torch.randn(6, 4),
        torch.randn(6, 4).t(),
        torch.randn(3, 5, dtype=torch.bfloat16),
        torch.tensor(3.0),
        torch.empty(0, 7),
        torch.arange(4),
    ],
    ids=["plain", "transposed", "bfloat16", "scalar", "empty", "int64"],
)
def test_what_is_cut_comes_together_as_it_was(
    monkeypatch: pytest.MonkeyPatch, value: torch.Tensor, chunk_bytes: int
) -> None:
    monkeypatch.setattr(export, "CHUNK_BYTES", chunk_bytes)
    tensor = ExportedTensor(expert=ExpertId(layer=3, index=7), name="a/b", value=value, weight_version=5)
    paced: list[int] = []
    chunks = [*export.cut(tensor), *export.cut(tensor)]
    found = list(export.assemble(chunks, pace=paced.append))
    assert len(found) == 2 and sum(paced) == 2 * value.nbytes and max(paced) <= chunk_bytes
    for whole in found:
        assert_same_fields(whole, tensor)
        assert whole.value.is_contiguous()


def test_chunks_become_tensors() -> None:
    content = torch.arange(4.0).numpy().tobytes()
    chunks = [chunk(content[:5]), chunk(content[5:], offset_bytes=5), chunk(b"", shape=(0, 3)), chunk(content)]
    tensors = list(export.assemble(chunks))
    assert [tuple(t.value.shape) for t in tensors] == [(4,), (0, 3), (4,)]
    assert torch.equal(tensors[0].value, torch.arange(4.0)) and torch.equal(tensors[2].value, torch.arange(4.0))
    assert tensors[0].expert == ExpertId(layer=1, index=2)


@pytest.mark.parametrize(
    ("chunks", "complaint"),
    [
        ([chunk(b"1234", crc32=1)], "content: the checksum of 1/2 w is wrong"),
        ([chunk(bytes(8)), chunk(bytes(4), offset_bytes=12)], "offset_bytes: 12 of 1/2 w, not 8"),
        ([chunk(bytes(8), offset_bytes=8)], "offset_bytes: 8 of 1/2 w, not 0"),
        ([chunk(bytes(12))], "content: the last tensor is incomplete"),
        ([chunk(bytes(20))], "content: 20 bytes of 1/2 w, not 16"),
        ([chunk(b"")], "content: 0 bytes of 1/2 w, not 16"),
        ([chunk(bytes(8)), chunk(bytes(8), offset_bytes=8, name="v")], "name: 1/2 v amid 1/2 w"),
        ([chunk(bytes(8)), chunk(bytes(8), offset_bytes=8, shape=(2, 2))], "name: 1/2 w amid 1/2 w"),
        ([chunk(bytes(16), dtype=77)], "dtype: 77 is unknown"),
        ([chunk(bytes(16), dtype=tensor_pb2.INT32)], r"dtype: torch\.int32 of 1/2 w"),
        ([chunk(bytes(16), shape=(-4,))], r"shape: \[-4\] of 1/2 w"),
        ([chunk(bytes(16), shape=(1, 1, -2, -2))], r"shape: \[1, 1, -2, -2\] of 1/2 w"),
        ([chunk(b"", shape=(2**62,))], "of 1/2 w is too large"),
        ([chunk(b"", shape=(0, 2**62, 2**62))], "of 1/2 w is too large"),
    ],
)
def test_broken_chunks_are_refused(chunks: list[expert_pb2.ExportChunk], complaint: str) -> None:
    with pytest.raises(InvalidMessage, match=complaint):
        list(export.assemble(chunks))


def test_a_tensor_beyond_the_bytes_that_are_wanted_is_refused_at_its_first_chunk() -> None:
    taken: list[int] = []

    def endless() -> Iterator[expert_pb2.ExportChunk]:
        for offset_bytes in range(0, 400, 4):
            taken.append(offset_bytes)
            yield chunk(bytes(4), shape=(100,), offset_bytes=offset_bytes)

    with pytest.raises(InvalidMessage, match=r"shape: \[100\] of 1/2 w is too large, at most 399 bytes"):
        list(export.assemble(endless(), max_tensor_bytes=399))
    assert taken == [0]
    assert len(list(export.assemble(endless(), max_tensor_bytes=400))) == 1
