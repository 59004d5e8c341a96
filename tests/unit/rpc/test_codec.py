"""Encoding and decoding is exact bit for bit, and malformed messages are refused by the name of the field."""

import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from moecluster.errors import InvalidMessage
from moecluster.proto import expert_pb2, tensor_pb2
from moecluster.rpc import tensors
from moecluster.rpc.expert import messages
from moecluster.rpc.same_host.segment import PeerSegment, Region, Segment
from moecluster.types import ComputeBatch, ComputeResult, MicroBatchTag, Phase, PlacementNumber, StepTag
from tests.support.expert.batches import assert_same_fields, make_batch

WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
SEGMENT_BYTES = 2**20
SMALL = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module")
def segment() -> Iterator[Segment]:
    segment = Segment(SEGMENT_BYTES)
    yield segment
    segment.close()


@pytest.fixture(scope="module")
def peer(segment: Segment) -> PeerSegment:
    return PeerSegment(os.getpid(), segment.fd, segment.size_bytes)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits: NaNs with payloads, infinities and negative zeros too."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).view(shape)


@given(
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=3).map(tuple),
    dtype=st.sampled_from(WIRE_DTYPES),
    seed=st.integers(0, 99),
    shared=st.booleans(),
)
def test_tensors_arrive_bit_for_bit(
    segment: Segment, peer: PeerSegment, shape: tuple[int, ...], dtype: torch.dtype, seed: int, shared: bool
) -> None:
    value = random_bits(shape, dtype, seed)
    message = tensors.encode_tensor(value, segment if shared else None)
    received = tensor_pb2.Tensor.FromString(message.SerializeToString())
    got = tensors.decode_tensor(received, "x", dtypes=(dtype,), shape=(None,) * len(shape), peer=peer)
    assert got.dtype == dtype and got.shape == value.shape
    assert torch.equal(got.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    region = tensors.region_of(received)
    assert (region is not None) == shared
    if region is not None:
        segment.release(region.sequence)


def test_a_tensor_that_is_not_contiguous_arrives_row_major(segment: Segment, peer: PeerSegment) -> None:
    value = torch.arange(12.0).view(3, 4).T
    for through in (None, segment):
        message = tensors.encode_tensor(value, through)
        got = tensors.decode_tensor(message, "x", dtypes=(torch.float32,), shape=(4, 3), peer=peer)
        assert torch.equal(got, value)


def test_a_tensor_goes_inline_when_the_segment_is_full() -> None:
    small = Segment(256)
    message = tensors.encode_tensor(torch.zeros(1000), small)
    assert message.WhichOneof("content") == "inline" and len(message.inline) == 4000
    small.close()


@st.composite
def batches(draw: st.DrawFn) -> ComputeBatch:
    rows = draw(st.integers(1, 6))
    groups = draw(
        st.dictionaries(
            st.integers(0, 2**31 - 1),
            st.lists(st.integers(0, rows - 1), min_size=1, max_size=8).map(sorted),
            min_size=1,
            max_size=4,
        )
    )
    phase = draw(st.sampled_from(Phase))
    train = None
    if phase is not Phase.FORWARD:
        train = MicroBatchTag(
            step=StepTag(term=draw(SMALL), step=draw(SMALL), attempt=draw(SMALL)),
            rank=draw(st.integers(0, 2**31 - 1)),
            micro_batch=draw(st.integers(0, 2**31 - 1)),
            pass_index=draw(st.integers(0, 2**31 - 1)),
        )
    return make_batch(
        groups,
        rows=rows,
        width=draw(st.integers(1, 9)),
        phase=phase,
        dtype=draw(st.sampled_from(tensors.ROW_DTYPES)),
        seed=draw(st.integers(0, 99)),
        layer=draw(st.integers(0, 2**31 - 1)),
        deadline_s=draw(st.floats(1e-9, messages.MAX_DEADLINE_S)),
        train=train,
        request_id=draw(SMALL),
        placement=PlacementNumber(draw(SMALL), draw(SMALL)),
        weight_version=draw(SMALL),
        incarnation=draw(st.text(max_size=8)),
        unsummed=draw(st.booleans()),
    )


def through_the_wire(message: expert_pb2.Batch) -> expert_pb2.Batch:
    return expert_pb2.Batch.FromString(message.SerializeToString())


@given(batch=batches(), shared=st.booleans())
def test_batches_arrive_as_they_were_sent(
    segment: Segment, peer: PeerSegment, batch: ComputeBatch, shared: bool
) -> None:
    message = through_the_wire(messages.encode_batch(batch, segment if shared else None))
    assert_same_fields(messages.decode_batch(message, peer if shared else None), batch)
    for tensor in (message.x, message.grad):
        region = tensors.region_of(tensor)
        if region is not None:
            segment.release(region.sequence)


def result_for(batch: ComputeBatch) -> ComputeResult:
    num_rows, num_pairs = len(batch.x_ND), len(batch.pair_rows_P)
    if batch.phase is Phase.BACKWARD:
        return ComputeResult(
            request_id=batch.request_id, grad_x_ND=batch.x_ND * 3, grad_w_P=torch.arange(num_pairs).float()
        )
    if batch.unsummed:
        y_PD = batch.x_ND.new_ones(num_pairs, batch.x_ND.shape[1]) * 2
        return ComputeResult(request_id=batch.request_id, y_PD=y_PD)
    return ComputeResult(request_id=batch.request_id, y_ND=batch.x_ND.new_ones(num_rows, batch.x_ND.shape[1]))


@given(batch=batches(), shared=st.booleans())
def test_results_arrive_as_they_were_sent_and_free_their_regions(
    segment: Segment, peer: PeerSegment, batch: ComputeBatch, shared: bool
) -> None:
    result = result_for(batch)
    message = messages.encode_result(result, segment if shared else None)
    message = expert_pb2.BatchReply.FromString(message.SerializeToString())
    released: list[int] = []
    assert_same_fields(messages.decode_result(message, batch, peer if shared else None, released.append), result)
    regions = [tensors.region_of(tensor) for tensor in (message.y, message.grad_x)]
    assert released == [region.sequence for region in regions if region is not None]
    assert bool(released) == shared
    for sequence in released:
        segment.release(sequence)


# Three rows of width four; expert 1 gets rows 0 and 2, expert 5 gets row 1.
GOOD = messages.encode_batch(make_batch({1: [0, 2], 5: [1]}, rows=3, width=4, phase=Phase.BACKWARD))
Change = Callable[[expert_pb2.Batch], object]


def set_field(name: str, value: object) -> Change:
    return lambda message: setattr(message, name, value)


def set_list(name: str, *values: int) -> Change:
    def change(message: expert_pb2.Batch) -> None:
        numbers = getattr(message, name)
        del numbers[:]
        numbers.extend(values)

    return change


def set_tensor(name: str, value: torch.Tensor) -> Change:
    return lambda message: getattr(message, name).CopyFrom(tensors.encode_tensor(value))


def set_shape(name: str, *shape: int) -> Change:
    def change(message: expert_pb2.Batch) -> None:
        tensor = getattr(message, name)
        del tensor.shape[:]
        tensor.shape.extend(shape)

    return change


def change_tensor(name: str, field: str, value: object) -> Change:
    return lambda message: setattr(getattr(message, name), field, value)


def set_region(name: str, *, offset: int = 64, length_bytes: int = 48, sequence: int = 1) -> Change:
    return lambda message: getattr(message, name).region.CopyFrom(
        tensor_pb2.Region(offset=offset, length_bytes=length_bytes, sequence=sequence)
    )


def clear(name: str) -> Change:
    return lambda message: message.ClearField(name)


MALFORMED: list[tuple[str, str, Change]] = [
    ("phase", "phase: 0", set_field("phase", 0)),
    ("phase that does not exist", "phase: 99", set_field("phase", 99)),
    ("no deadline", "deadline_s: 0.0", set_field("deadline_s", 0.0)),
    ("NaN deadline", "deadline_s: nan", set_field("deadline_s", math.nan)),
    ("infinite deadline", "deadline_s: inf", set_field("deadline_s", math.inf)),
    ("negative deadline", "deadline_s: -1.0", set_field("deadline_s", -1.0)),
    ("deadline of days", "deadline_s: 90000.0", set_field("deadline_s", 90000.0)),
    ("layer", "layer: -1", set_field("layer", -1)),
    ("no step", "step: a backward message", clear("step")),
    ("rank", "rank", set_field("rank", -1)),
    ("micro-batch", "micro_batch", set_field("micro_batch", -2)),
    ("pass", "pass_index", set_field("pass_index", -(2**31))),
    ("no experts", "expert_pairs: 2 counts for 0 experts", set_list("experts")),
    (
        "no pairs",
        "expert_pairs: 0 counts for 0 experts",
        lambda m: (set_list("experts")(m), set_list("expert_pairs")(m)),
    ),
    ("more counts", "expert_pairs: 3 counts for 2 experts", set_list("expert_pairs", 1, 1, 1)),
    ("expert twice", "experts: not ascending", set_list("experts", 5, 5)),
    ("experts descend", "experts: not ascending", set_list("experts", 5, 1)),
    ("negative expert", "experts: not ascending", set_list("experts", -1, 5)),
    ("count of 0", "expert_pairs: a count below 1", set_list("expert_pairs", 3, 0)),
    ("negative count", "expert_pairs: a count below 1", set_list("expert_pairs", 4, -1)),
    ("counts too few", "pair_rows.shape: [3], not [2]", set_list("expert_pairs", 1, 1)),
    ("counts too many", "pair_rows.shape: [3], not [4]", set_list("expert_pairs", 2, 2)),
    ("huge counts", "pair_rows.shape", set_list("expert_pairs", 2**31 - 1, 2**31 - 1)),
    ("no x", "x.dtype: 0", clear("x")),
    ("x of integers", "x.dtype: INT64, not float32 or bfloat16 or float16", set_tensor("x", torch.zeros(3, 4).long())),
    ("unknown dtype", "x.dtype: 77", change_tensor("x", "dtype", 77)),
    ("x is flat", "x.shape: [12]", set_shape("x", 12)),
    ("x has three dimensions", "x.shape: [3, 2, 2]", set_shape("x", 3, 2, 2)),
    ("x is a scalar", "x.shape: []", set_shape("x")),
    ("negative rows", "x.shape: [-3, -4]", set_shape("x", -3, -4)),
    ("huge rows", "x.shape", set_shape("x", 2**62, 2**62)),
    ("too many rows", "x.shape", set_shape("x", tensors.MAX_ROWS + 1, 1)),
    ("too wide", "x.shape", set_shape("x", 1, tensors.MAX_WIDTH + 1)),
    ("x cut off", "x.inline: 44 bytes, not 48", lambda m: change_tensor("x", "inline", m.x.inline[:-4])(m)),
    ("x too long", "x.inline: 49 bytes, not 48", lambda m: change_tensor("x", "inline", m.x.inline + b"\0")(m)),
    ("x without content", "x.inline: 0 bytes, not 48", lambda m: m.x.ClearField("inline")),
    ("no rows", "pair_rows: an index", set_tensor("x", torch.zeros(0, 4))),
    ("region without a segment", "x.region: no segment", set_region("x")),
    ("no pair_rows", "pair_rows.dtype", clear("pair_rows")),
    ("pair_rows of int64", "pair_rows.dtype: INT64, not int32", set_tensor("pair_rows", torch.tensor([0, 2, 1]))),
    ("pair_rows too short", "pair_rows.shape: [2], not [3]", set_tensor("pair_rows", torch.tensor([0, 2]).int())),
    ("pair_rows in two dimensions", "pair_rows.shape", set_shape("pair_rows", 3, 1)),
    ("negative row", "pair_rows: an index outside", set_tensor("pair_rows", torch.tensor([-1, 2, 1]).int())),
    ("row beyond the last", "pair_rows: an index outside", set_tensor("pair_rows", torch.tensor([0, 3, 1]).int())),
    ("rows descend", "pair_rows: not ascending", set_tensor("pair_rows", torch.tensor([2, 0, 1]).int())),
    ("pair_rows in a region", "pair_rows.region: no segment", set_region("pair_rows", length_bytes=12)),
    ("no pair_weights", "pair_weights.dtype", clear("pair_weights")),
    ("weights of float16", "pair_weights.dtype: FLOAT16", set_tensor("pair_weights", torch.ones(3).half())),
    ("weights too many", "pair_weights.shape: [4], not [3]", set_tensor("pair_weights", torch.ones(4))),
    ("weights cut off", "pair_weights.inline: 5 bytes, not 12", change_tensor("pair_weights", "inline", b"12345")),
    ("no grad", "grad.dtype", clear("grad")),
    ("grad of another dtype", "grad.dtype: BFLOAT16, not float32", set_tensor("grad", torch.zeros(3, 4).bfloat16())),
    ("grad of other rows", "grad.shape: [2, 4], not [3, 4]", set_tensor("grad", torch.zeros(2, 4))),
    ("grad of another width", "grad.shape: [3, 5], not [3, 4]", set_tensor("grad", torch.zeros(3, 5))),
]


def test_the_message_that_the_table_breaks_is_good() -> None:
    assert messages.decode_batch(through_the_wire(GOOD)).experts == (1, 5)


@pytest.mark.parametrize(("field", "change"), [pytest.param(f, c, id=name) for name, f, c in MALFORMED])
def test_a_malformed_field_is_refused_by_name(field: str, change: Change) -> None:
    message = through_the_wire(GOOD)
    change(message)
    with pytest.raises(InvalidMessage) as caught:
        messages.decode_batch(through_the_wire(message))
    assert field in str(caught.value)


def shared_batch(segment: Segment) -> tuple[expert_pb2.Batch, Region]:
    message = messages.encode_batch(make_batch({1: [0, 2], 5: [1]}, rows=3, width=4), segment)
    region = tensors.region_of(message.x)
    assert region is not None
    return message, region


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda region: replace(region, offset=SEGMENT_BYTES), "region: bytes .* outside the segment"),
        (lambda region: replace(region, offset=2**63), "region: bytes .* outside the segment"),
        (lambda region: replace(region, offset=0), "region: bytes .* outside the segment"),
        (lambda region: replace(region, offset=region.offset + 8), "region: bytes .* outside the segment"),
        (lambda region: replace(region, offset=SEGMENT_BYTES - 64), "region: bytes .* outside the segment"),
        (lambda region: replace(region, length_bytes=44), "x.region: 44 bytes, not 48"),
        (lambda region: replace(region, length_bytes=2**64 - 1), "x.region: .* bytes, not 48"),
        (lambda region: replace(region, sequence=region.sequence + 1), "region: sequence .* was overwritten"),
    ],
)
def test_a_region_that_is_not_what_it_says_is_refused(
    segment: Segment, peer: PeerSegment, change: Callable[[Region], Region], field: str
) -> None:
    message, region = shared_batch(segment)
    wrong = change(region)
    set_region("x", offset=wrong.offset, length_bytes=wrong.length_bytes, sequence=wrong.sequence)(message)
    with pytest.raises(InvalidMessage, match=field):
        messages.decode_batch(message, peer)
    segment.release(region.sequence)


def test_a_region_that_was_used_again_is_noticed_after_reading(segment: Segment, peer: PeerSegment) -> None:
    message, region = shared_batch(segment)
    messages.decode_batch(message, peer)
    segment.release(region.sequence)
    taken = segment.write(torch.zeros(3, 4))
    assert taken is not None and taken.offset == region.offset
    with pytest.raises(InvalidMessage, match=f"region: sequence {region.sequence} was overwritten"):
        peer.check(region)
    with pytest.raises(InvalidMessage, match="was overwritten"):
        messages.decode_batch(message, peer)
    segment.release(taken.sequence)


@pytest.mark.parametrize(
    ("phase", "unsummed", "change", "field"),
    [
        (Phase.FORWARD, False, lambda m: m.ClearField("y"), "y.dtype"),
        (Phase.FORWARD, False, lambda m: m.y.CopyFrom(tensors.encode_tensor(torch.zeros(3, 4).half())), "y.dtype"),
        (Phase.FORWARD, False, lambda m: m.y.CopyFrom(tensors.encode_tensor(torch.zeros(2, 4))), "y.shape"),
        (Phase.FORWARD, True, lambda m: m.y.CopyFrom(tensors.encode_tensor(torch.zeros(3, 4))), "y.shape"),
        (Phase.FORWARD, False, lambda m: setattr(m.y, "inline", b"1"), "y.inline"),
        (Phase.TRAIN_FORWARD, False, lambda m: m.y.region.CopyFrom(tensor_pb2.Region(length_bytes=48)), "y.region"),
        (Phase.BACKWARD, False, lambda m: m.ClearField("grad_x"), "grad_x.dtype"),
        (Phase.BACKWARD, False, lambda m: m.ClearField("grad_w"), "grad_w.dtype"),
        (Phase.BACKWARD, False, lambda m: m.grad_w.CopyFrom(tensors.encode_tensor(torch.zeros(5))), "grad_w.shape"),
    ],
)
def test_a_malformed_result_is_refused_by_name(
    phase: Phase, unsummed: bool, change: Callable[[expert_pb2.BatchReply], object], field: str
) -> None:
    batch = make_batch({1: [0, 2], 5: [1, 2]}, rows=3, width=4, phase=phase, unsummed=unsummed)
    message = messages.encode_result(result_for(batch))
    messages.decode_result(message, batch)
    change(message)
    with pytest.raises(InvalidMessage, match=rf"^{field}"):
        messages.decode_result(message, batch)


@given(
    places=st.lists(st.tuples(st.integers(0, len(GOOD.SerializeToString()) - 1), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 40),
)
def test_damaged_bytes_give_a_sound_batch_or_an_invalid_message(places: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(GOOD.SerializeToString())
    for place, value in places:
        damaged[place] = value
    try:
        message = expert_pb2.Batch.FromString(bytes(damaged[: len(damaged) - cut]))
    except DecodeError:
        return  # gRPC refuses it before decoding
    try:
        batch = messages.decode_batch(message)
    except InvalidMessage:
        return
    assert len(batch.experts) == len(batch.pair_counts) and sum(batch.pair_counts) == len(batch.pair_rows_P)
    assert batch.pair_rows_P.min() >= 0 and batch.pair_rows_P.max() < len(batch.x_ND)
    assert len(batch.pair_weights_P) == len(batch.pair_rows_P)
    assert 0 < batch.deadline_s <= messages.MAX_DEADLINE_S
    assert (batch.grad_ND is not None) == (batch.phase is Phase.BACKWARD)
    if batch.grad_ND is not None:
        assert batch.grad_ND.shape == batch.x_ND.shape


def test_elements_are_little_endian() -> None:
    assert tensors.tensor_bytes(torch.tensor([1.0, -2.0])) == struct.pack("<2f", 1.0, -2.0)


def test_unknown_dtype_codes_are_refused() -> None:
    assert tensors.dtype_of(tensor_pb2.BFLOAT16) is torch.bfloat16
    with pytest.raises(InvalidMessage, match="dtype: 0 is unknown"):
        tensors.dtype_of(tensor_pb2.DTYPE_UNSPECIFIED)
