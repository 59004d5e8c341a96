"""Hundreds of malformed messages to an expert actor: each refused with its field's name, and nobody else notices."""

import math
import queue
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from moecluster.proto import expert_pb2, tensor_pb2
from moecluster.proto.expert_pb2_grpc import ExpertServiceStub
from moecluster.roles.expert_service import ExpertService
from moecluster.rpc import codec
from moecluster.rpc.expert_server import MAX_EXPERTS_PER_ORDER, serve_expert
from moecluster.rpc.server import RunningServer
from moecluster.rpc.shared_memory import Segment
from moecluster.types import MicroBatchTag, Phase
from tests.small_actor import EXPERTS, TAG, TIMEOUT_S, WIDTH, ask, batch_of, save_small_model, training

SERVICE = "moecluster.v1.ExpertService"
NOTHING = expert_pb2.StatusRequest()
GOOD = codec.encode_batch(batch_of(5))
GENERATED = 400


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[ExpertService]:
    with training(checkpoint) as service:
        yield service


@pytest.fixture(scope="module")
def server(service: ExpertService) -> Iterator[RunningServer]:
    server = serve_expert(service)
    yield server
    server.stop(0.0)


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> ExpertServiceStub:
    return ExpertServiceStub(channel)


class RawStream:
    """A Compute stream on which anything can be sent."""

    def __init__(self, stub: ExpertServiceStub, segment: Segment | None = None) -> None:
        self._outbox: queue.SimpleQueue[expert_pb2.ComputeRequest | None] = queue.SimpleQueue()
        self._replies = stub.Compute(iter(self._outbox.get, None), timeout=60.0)
        hello = expert_pb2.Hello(router="test")
        if segment is not None:
            hello.segment.CopyFrom(segment.offer())
        self.send(expert_pb2.ComputeRequest(hello=hello))
        self.greeting = next(self._replies).hello

    def send(self, request: expert_pb2.ComputeRequest) -> None:
        self._outbox.put(request)

    def ask(self, batch: expert_pb2.Batch) -> expert_pb2.BatchReply:
        self.send(expert_pb2.ComputeRequest(batch=batch))
        reply: expert_pb2.BatchReply = next(self._replies).batch
        return reply

    def ending(self) -> grpc.StatusCode:
        """How the stream ends."""
        try:
            for _ in self._replies:
                pass
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    def close(self) -> None:
        self._outbox.put(None)
        self._replies.cancel()


@pytest.fixture
def stream(stub: ExpertServiceStub) -> Iterator[RawStream]:
    stream = RawStream(stub)
    yield stream
    stream.close()


def check_serves(service: ExpertService, stub: ExpertServiceStub) -> None:
    """The next good batch is answered, bit for bit as it is in process."""
    stream = RawStream(stub)
    check_good_answer(service, stream)
    stream.close()


def check_good_answer(service: ExpertService, stream: RawStream) -> None:
    reply = stream.ask(GOOD)
    assert reply.code == expert_pb2.OK, reply.detail
    batch = codec.decode_batch(GOOD)
    y_ND = codec.decode_result(reply, batch).y_ND
    expected_ND = ask(service, batch).y_ND
    assert y_ND is not None and expected_ND is not None and torch.equal(y_ND, expected_ND)


# -- generated batches --

Break = Callable[[random.Random, expert_pb2.Batch], object]


def replace_list(numbers: Any, values: Sequence[int]) -> None:
    del numbers[:]
    numbers.extend(values)


def some_tensor(rng: random.Random, batch: expert_pb2.Batch) -> tensor_pb2.Tensor:
    tensors = [batch.x, batch.pair_rows, batch.pair_weights]
    return rng.choice([*tensors, batch.grad] if batch.phase == expert_pb2.BACKWARD else tensors)


def wrong_dtype(rng: random.Random, batch: expert_pb2.Batch) -> None:
    tensor = some_tensor(rng, batch)
    code: Any = rng.choice([code for code in (0, 4, 5, 6, 1000, -1) if code != tensor.dtype])  # the wire carries any
    tensor.dtype = code


def wrong_shape(rng: random.Random, batch: expert_pb2.Batch) -> None:
    tensor = some_tensor(rng, batch)
    sizes = [-1, 0, 1, 2, 7, 2**20 + 1, 2**31, 2**62, -(2**63)]
    shape = [rng.choice(sizes) for _ in range(rng.randrange(5))]
    if math.prod(shape) != math.prod(tensor.shape):
        replace_list(tensor.shape, shape)
    else:
        tensor.shape.append(1)


def wrong_bytes(rng: random.Random, batch: expert_pb2.Batch) -> None:
    tensor = some_tensor(rng, batch)
    content = tensor.inline
    tensor.inline = rng.choice([content[: rng.randrange(len(content))], content + rng.randbytes(rng.randint(1, 40))])


def region_that_nobody_agreed_on(rng: random.Random, batch: expert_pb2.Batch) -> None:
    length_bytes = len(batch.x.inline)
    some_tensor(rng, batch).region.CopyFrom(tensor_pb2.Region(offset=64, length_bytes=length_bytes, sequence=1))


def wrong_rows(rng: random.Random, batch: expert_pb2.Batch) -> None:
    rows = codec.decode_tensor(batch.pair_rows, "", dtypes=(torch.int32,), shape=(None,)).clone()
    rows[rng.randrange(len(rows))] = rng.choice([-1, -(2**31), 5, 2**31 - 1])
    batch.pair_rows.CopyFrom(codec.encode_tensor(rows))


def wrong_counts(rng: random.Random, batch: expert_pb2.Batch) -> None:
    counts = list(batch.expert_pairs)
    counts[rng.randrange(len(counts))] += rng.choice([-(2**30), -6, -1, 1, 2**30])
    replace_list(batch.expert_pairs, counts[: rng.choice([1, 2, 2, 2])])


def wrong_experts(rng: random.Random, batch: expert_pb2.Batch) -> None:
    replace_list(batch.experts, rng.choice([[], [2], [2, 0], [0, 0], [-1, 2], [0, 1, 2], [-(2**31), 2**31 - 1]]))


def another_width(rng: random.Random, batch: expert_pb2.Batch) -> None:
    rows = torch.zeros(5, rng.choice([1, WIDTH - 1, WIDTH + 1, 3 * WIDTH]))
    batch.x.CopyFrom(codec.encode_tensor(rows))
    batch.grad.CopyFrom(codec.encode_tensor(rows))


def another_float(rng: random.Random, batch: expert_pb2.Batch) -> None:
    rows = torch.zeros(5, WIDTH, dtype=rng.choice([torch.bfloat16, torch.float16]))
    batch.x.CopyFrom(codec.encode_tensor(rows))
    batch.grad.CopyFrom(codec.encode_tensor(rows))


def wrong_deadline(rng: random.Random, batch: expert_pb2.Batch) -> None:
    batch.deadline_s = rng.choice([math.nan, math.inf, -math.inf, 0.0, -0.0, -1e-300, -rng.random(), 3600.1, 1e308])


def wrong_phase(rng: random.Random, batch: expert_pb2.Batch) -> None:
    number: Any = rng.choice([0, 4, -1, 2**31 - 1])  # the wire carries any
    batch.phase = number


def wrong_layer(rng: random.Random, batch: expert_pb2.Batch) -> None:
    batch.layer = rng.choice([-1, -(2**31)])


def sequences(rng: random.Random, batch: expert_pb2.Batch) -> None:
    batch.sequence_offsets.extend([0, rng.randrange(9)])


def missing_field(rng: random.Random, batch: expert_pb2.Batch) -> None:
    batch.ClearField(rng.choice(["x", "experts", "expert_pairs", "pair_rows", "pair_weights", "deadline_s", "phase"]))


BREAKS: list[Break] = [
    wrong_dtype,
    wrong_shape,
    wrong_bytes,
    region_that_nobody_agreed_on,
    wrong_rows,
    wrong_counts,
    wrong_experts,
    another_width,
    another_float,
    wrong_deadline,
    wrong_phase,
    wrong_layer,
    sequences,
    missing_field,
]
FIELDS = {field.name for field in expert_pb2.Batch.DESCRIPTOR.fields}


def malformed_batches() -> Iterator[tuple[str, expert_pb2.Batch]]:
    rng = random.Random(0)
    train = MicroBatchTag(step=TAG)
    bases = [
        GOOD,
        *(codec.encode_batch(batch_of(5, phase=p, train=train)) for p in (Phase.TRAIN_FORWARD, Phase.BACKWARD)),
    ]
    for number in range(GENERATED):
        batch = expert_pb2.Batch()
        batch.CopyFrom(rng.choice(bases))
        batch.request_id = number
        what = BREAKS[number % len(BREAKS)]
        what(rng, batch)
        yield f"{number}: {what.__name__}", batch


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
        batch = codec.encode_batch(codec.decode_batch(GOOD), segment)
        right = codec.region_of(batch.x)
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


# -- the stream's own rules --


def raw_compute(channel: grpc.Channel) -> Any:
    """The method for whatever bytes."""
    return channel.stream_stream(f"/{SERVICE}/Compute", None, None)


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
        list(compute(iter([bytes(codec.MAX_MESSAGE_BYTES + 1)]), timeout=60.0))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    check_good_answer(service, stream)


# -- orders --


def load(**changes: Any) -> expert_pb2.LoadRequest:
    experts = [tensor_pb2.ExpertRef(layer=e.layer, index=e.index) for e in EXPERTS]
    return expert_pb2.LoadRequest(
        **{"term": 1, "experts": experts, "timeout_s": 10.0, "checkpoint": "/none", **changes}
    )


def optimizer(**changes: Any) -> expert_pb2.OptimizerSettings:
    return expert_pb2.OptimizerSettings(**{"name": "adamw", "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, **changes})


STEP = expert_pb2.StepTag(term=1, step=1)
NEGATIVE = [tensor_pb2.ExpertRef(layer=-1, index=0)]
INVALID = grpc.StatusCode.INVALID_ARGUMENT
ORDERS: list[tuple[str, Message, grpc.StatusCode, str]] = [
    ("Load", load(timeout_s=0.0), INVALID, "timeout_s"),
    ("Load", load(timeout_s=math.nan), INVALID, "timeout_s"),
    ("Load", load(timeout_s=-1.0), INVALID, "timeout_s"),
    ("Load", load(timeout_s=1e9), INVALID, "timeout_s"),
    ("Load", load(experts=NEGATIVE), INVALID, "experts: a negative"),
    ("Load", load(experts=[tensor_pb2.ExpertRef()] * (MAX_EXPERTS_PER_ORDER + 1)), INVALID, "experts: 65537, at most"),
    ("Load", load(optimizer=optimizer(name="lion")), INVALID, "optimizer.name: 'lion' is none of adamw, sgd"),
    ("Load", load(optimizer=optimizer(beta1=1.0)), INVALID, "optimizer: beta1"),
    ("Load", load(optimizer=optimizer(beta2=math.nan)), INVALID, "optimizer: beta1, beta2"),
    ("Load", load(optimizer=optimizer(momentum=-0.1)), INVALID, "momentum"),
    ("Load", load(optimizer=optimizer(eps=-1.0)), INVALID, "optimizer: eps"),
    ("Load", load(optimizer=optimizer(weight_decay=math.nan)), INVALID, "weight_decay"),
    ("Load", load(), grpc.StatusCode.FAILED_PRECONDITION, "/none: no such directory"),
    ("Load", load(checkpoint="/" + "x" * 5000), grpc.StatusCode.FAILED_PRECONDITION, "no such directory"),
    ("Load", load(checkpoint="/a\0b"), grpc.StatusCode.FAILED_PRECONDITION, "no such directory"),
    ("Unload", expert_pb2.UnloadRequest(term=1, experts=NEGATIVE), INVALID, "experts: a negative"),
    ("Unload", expert_pb2.UnloadRequest(term=0), grpc.StatusCode.OUT_OF_RANGE, "controller term 0 is over"),
    ("SetPlacement", expert_pb2.SetPlacementRequest(term=0), grpc.StatusCode.OUT_OF_RANGE, "controller term 0 is over"),
    ("Export", expert_pb2.ExportRequest(experts=NEGATIVE), INVALID, "experts: a negative"),
    ("Export", expert_pb2.ExportRequest(experts=[tensor_pb2.ExpertRef(layer=7)]), grpc.StatusCode.NOT_FOUND, "7/0"),
    ("Reduce", expert_pb2.ReduceRequest(), INVALID, "step: missing"),
    (
        "Reduce",
        expert_pb2.ReduceRequest(step=STEP, expected=[expert_pb2.MessageKey(rank=-5)]),
        grpc.StatusCode.ABORTED,
        "1 missing messages",
    ),
    ("Prepare", expert_pb2.PrepareRequest(clip_scale=1.0), INVALID, "step: missing"),
    ("Prepare", expert_pb2.PrepareRequest(step=STEP, clip_scale=1.5), INVALID, "clip_scale"),
    ("Prepare", expert_pb2.PrepareRequest(step=STEP, clip_scale=math.nan), INVALID, "clip_scale"),
    ("Prepare", expert_pb2.PrepareRequest(step=STEP, learning_rate=-1.0), INVALID, "learning_rate"),
    ("Prepare", expert_pb2.PrepareRequest(step=STEP, learning_rate=math.inf), INVALID, "learning_rate"),
    ("Prepare", expert_pb2.PrepareRequest(step=STEP, learning_rate=math.nan), INVALID, "learning_rate"),
    ("Commit", expert_pb2.CommitRequest(), INVALID, "step: missing"),
    ("Commit", expert_pb2.CommitRequest(step=STEP), grpc.StatusCode.OUT_OF_RANGE, "is not prepared here"),
    ("Abort", expert_pb2.AbortRequest(), INVALID, "step: missing"),
]


@pytest.mark.parametrize(
    ("method", "request_", "code", "field"),
    [pytest.param(*order, id=f"{order[0]} {order[3][:40]}") for order in ORDERS],
)
def test_a_wrong_order_is_refused_by_name(
    stub: ExpertServiceStub, method: str, request_: Message, code: grpc.StatusCode, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(getattr(stub, method)(request_, timeout=TIMEOUT_S))
    assert caught.value.code() is code, caught.value.details()
    assert field in (caught.value.details() or "")
    assert stub.Status(NOTHING, timeout=TIMEOUT_S).actor == "expert-0"


EXTREMES: dict[int, list[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: [0, -1, 2**31 - 1, -(2**31), 1000],
    FieldDescriptor.CPPTYPE_UINT32: [0, 2**32 - 1],
    FieldDescriptor.CPPTYPE_UINT64: [0, 2**64 - 1, 2**63, 12345],
    FieldDescriptor.CPPTYPE_INT64: [0, -1, 2**63 - 1, -(2**63)],
    FieldDescriptor.CPPTYPE_DOUBLE: [0.0, -1.0, 0.5, math.nan, math.inf, 1e308, -1e-308],
    FieldDescriptor.CPPTYPE_BOOL: [False, True],
    FieldDescriptor.CPPTYPE_STRING: ["", "adamw", "\0", "../..", "x" * 5000, "\N{SNOWMAN}"],
}


def fill(message: Message, rng: random.Random) -> None:
    """Sets fields of all depths to extreme values, or leaves them out."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.3:
            continue
        if field.message_type is not None:
            inner = getattr(message, field.name)
            for target in [inner.add() for _ in range(rng.choice([1, 3, 50]))] if field.is_repeated else [inner]:
                fill(target, rng)
        else:
            setattr(message, field.name, rng.choice(EXTREMES[field.cpp_type]))


def test_orders_of_extreme_values_get_a_clear_status_and_break_nothing(checkpoint: Path) -> None:
    """Clear: not UNKNOWN, which is what gRPC makes of an exception that nobody expected."""
    rng = random.Random(2)
    methods = expert_pb2.DESCRIPTOR.services_by_name["ExpertService"].methods
    seen: set[grpc.StatusCode] = set()
    with training(checkpoint) as service:
        server = serve_expert(service)
        with grpc.insecure_channel(server.address) as channel:
            stub = ExpertServiceStub(channel)
            for number in range(GENERATED):
                method = methods[1 + number % (len(methods) - 1)]  # all but Compute
                request = getattr(expert_pb2, method.input_type.name)()
                fill(request, rng)
                try:
                    list(
                        getattr(stub, method.name)(request, timeout=TIMEOUT_S)
                        if method.server_streaming
                        else [getattr(stub, method.name)(request, timeout=TIMEOUT_S)]
                    )
                    seen.add(grpc.StatusCode.OK)
                except grpc.RpcError as error:
                    assert error.details()
                    assert error.code() is not grpc.StatusCode.UNKNOWN, f"{method.name} {request}: {error.details()}"
                    seen.add(error.code())
            assert {grpc.StatusCode.OK, INVALID, grpc.StatusCode.OUT_OF_RANGE} <= seen
            check_serves(service, stub)
        server.stop(0.0)


def test_random_bytes_to_every_method_break_nothing(
    service: ExpertService, channel: grpc.Channel, stub: ExpertServiceStub
) -> None:
    rng = random.Random(3)
    refused = 0
    for method in expert_pb2.DESCRIPTOR.services_by_name["ExpertService"].methods:
        if method.client_streaming:
            continue
        make_call = channel.unary_stream if method.server_streaming else channel.unary_unary
        call: Any = make_call(f"/{SERVICE}/{method.name}", None, None)
        for _ in range(20):
            try:
                list(call(rng.randbytes(rng.randrange(1, 60)), timeout=TIMEOUT_S))
            except grpc.RpcError as error:
                assert error.code() is not grpc.StatusCode.UNKNOWN, error.details()
                refused += 1
    assert refused > 100
    check_serves(service, stub)
