"""Hundreds of malformed messages on Compute streams: each is refused naming its field; other streams are unaffected."""

import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from moecluster.expert.service import ExpertService
from moecluster.proto import expert_pb2, tensor_pb2
from moecluster.proto.expert_pb2_grpc import ExpertServiceStub
from moecluster.rpc import tensors
from moecluster.rpc.expert import messages
from moecluster.rpc.fields import MAX_MESSAGE_BYTES
from moecluster.rpc.same_host.segment import Segment
from tests.support.expert.small_actor import TIMEOUT_S, WIDTH, Occupied, training, wait_for_rows
from tests.support.fakes.raw_stream import GOOD, RawStream, check_good_answer, check_serves, raw_compute
from tests.support.malformed.malformed_batches import FIELDS, malformed_batches


@pytest.fixture
def service(checkpoint: Path) -> Iterator[ExpertService]:
    with training(checkpoint) as service:
        yield service


def test_every_malformed_batch_is_refused_by_name_and_good_ones_between_are_exact(
    service: ExpertService, stream: RawStream, stub: ExpertServiceStub
) -> None:
    for number, (name, batch) in enumerate(malformed_batches()):
        reply = stream.ask(batch)
        assert reply.code == expert_pb2.INVALID_ARGUMENT, (
            f"{name}: {expert_pb2.ReplyCode.Name(reply.code)} {reply.detail}"
        )
        assert reply.request_id == batch.request_id
        assert reply.detail.split(":")[0].split(".")[0] in FIELDS, f"{name}: {reply.detail}"
        if number % 10 == 0:
            check_good_answer(service, stream)
    check_serves(service, stub)


def test_every_malformed_region_is_refused_and_good_ones_between_are_exact(
    service: ExpertService, stub: ExpertServiceStub
) -> None:
    segment = Segment(2**16)
    stream = RawStream(stub, segment)
    assert stream.greeting.nonce == segment.nonce
    rng = random.Random(1)
    numbers = [0, 1, 32, 63, 64, 2**16 - 64, 2**16, 2**32, 2**63, 2**64 - 1]
    for _ in range(100):
        batch = messages.encode_batch(messages.decode_batch(GOOD), segment)
        right = tensors.region_of(batch.x)
        assert right is not None
        field = rng.choice(["offset", "length_bytes", "sequence"])
        setattr(batch.x.region, field, rng.choice([n for n in numbers if n != getattr(right, field)]))
        reply = stream.ask(batch)
        assert reply.code == expert_pb2.INVALID_ARGUMENT, f"{batch.x.region}: {reply.detail}"
        assert "region" in reply.detail
        segment.release(right.sequence)
    check_good_answer(service, stream)
    stream.close()
    segment.close()


def test_rows_that_are_written_over_while_they_are_used_are_noticed(
    service: ExpertService, stub: ExpertServiceStub
) -> None:
    """A router that reuses a region before its reply gets an error, not a wrong result."""
    segment = Segment(2**16)
    stream = RawStream(stub, segment)
    batch = messages.encode_batch(messages.decode_batch(GOOD), segment)
    region = tensors.region_of(batch.x)
    assert region is not None
    with Occupied(service):
        stream.send(expert_pb2.ComputeRequest(batch=batch))
        wait_for_rows(service, 5)
        segment.release(region.sequence)
        again = segment.write(torch.zeros(5, WIDTH))
        assert again is not None and again.offset == region.offset
    reply = stream.receive()
    assert reply.code == expert_pb2.INVALID_ARGUMENT
    assert reply.detail == f"region: sequence {region.sequence} was overwritten"
    check_good_answer(service, stream)
    stream.close()
    segment.close()


def test_releases_and_nonces_that_are_wrong_hurt_nobody(service: ExpertService, stub: ExpertServiceStub) -> None:
    segment = Segment(2**16)
    stream = RawStream(stub, segment)
    batch = expert_pb2.Batch()
    batch.CopyFrom(GOOD)
    batch.released.extend([0, 1, 2**64 - 1, 7, 7])
    batch.segment_nonce = b"guess" * 100
    reply = stream.ask(batch)
    assert reply.code == expert_pb2.OK and reply.y.WhichOneof("content") == "inline"
    check_good_answer(service, stream)
    stream.close()
    segment.close()


@pytest.mark.parametrize(
    ("first", "field"),
    [
        (expert_pb2.ComputeRequest(batch=GOOD), "hello: the first message"),
        (expert_pb2.ComputeRequest(), "hello: the first message"),
        (
            expert_pb2.ComputeRequest(
                hello=expert_pb2.Hello(segment=tensor_pb2.SegmentOffer(pid=1, fd=3, size_bytes=2**40))
            ),
            "hello.segment.size_bytes: 1099511627776, at most",
        ),
    ],
)
def test_a_stream_begins_with_a_sound_hello(
    service: ExpertService, stub: ExpertServiceStub, first: expert_pb2.ComputeRequest, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Compute(iter([first]), timeout=TIMEOUT_S))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert field in (caught.value.details() or "")
    check_serves(service, stub)


@pytest.mark.parametrize(("pid", "fd"), [(1, 0), (-1, -1), (2**62, 2**31 - 1), (0, 3)])
def test_a_segment_that_cannot_be_opened_is_no_error(
    service: ExpertService, stub: ExpertServiceStub, pid: int, fd: int
) -> None:
    offer = tensor_pb2.SegmentOffer(pid=pid, fd=fd, size_bytes=4096)
    hello = expert_pb2.ComputeRequest(hello=expert_pb2.Hello(segment=offer))
    (reply,) = stub.Compute(iter([hello]), timeout=TIMEOUT_S)
    assert reply.hello.incarnation == service.incarnation
    assert reply.hello.nonce == b"" and not reply.hello.HasField("segment")


def test_a_second_hello_ends_that_stream_only(
    service: ExpertService, stub: ExpertServiceStub, stream: RawStream
) -> None:
    breaking = RawStream(stub)
    breaking.send(expert_pb2.ComputeRequest(hello=expert_pb2.Hello()))
    assert breaking.ending() is grpc.StatusCode.OK
    check_good_answer(service, stream)


def test_a_stream_that_says_nothing_ends_quietly(service: ExpertService, stub: ExpertServiceStub) -> None:
    assert list(stub.Compute(iter([]), timeout=TIMEOUT_S)) == []
    check_serves(service, stub)


def test_bytes_that_are_no_message_end_that_stream_only(
    service: ExpertService, channel: grpc.Channel, stub: ExpertServiceStub, stream: RawStream
) -> None:
    compute = raw_compute(channel)
    hello = expert_pb2.ComputeRequest(hello=expert_pb2.Hello()).SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        list(compute(iter([hello, b"\xff\xff\xff"]), timeout=TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    check_good_answer(service, stream)


def test_a_message_over_the_limit_is_refused_as_such_and_others_stream_on(
    service: ExpertService, channel: grpc.Channel, stream: RawStream
) -> None:
    compute = raw_compute(channel)
    with pytest.raises(grpc.RpcError) as caught:
        list(compute(iter([bytes(MAX_MESSAGE_BYTES + 1)]), timeout=60.0))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    check_good_answer(service, stream)
