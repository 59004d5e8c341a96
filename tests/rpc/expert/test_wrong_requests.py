"""Wrong requests to an expert actor, hand-written and generated: each gets a clear status, and the actor keeps
serving."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from moecluster.expert.service import ExpertService
from moecluster.proto import expert_pb2, tensor_pb2
from moecluster.proto.expert_pb2_grpc import ExpertServiceStub
from moecluster.rpc.expert.interface import MAX_SNAPSHOT_BYTES
from moecluster.rpc.expert.server import serve_expert
from moecluster.rpc.fields import MAX_EXPERTS
from tests.support.expert.small_actor import EXPERTS, TIMEOUT_S, training
from tests.support.fakes.raw_stream import SERVICE, check_serves
from tests.support.malformed.malformed_batches import GENERATED


@pytest.fixture
def service(checkpoint: Path) -> Iterator[ExpertService]:
    with training(checkpoint) as service:
        yield service


NOTHING = expert_pb2.StatusRequest()


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
    ("Load", load(experts=NEGATIVE), INVALID, "experts: -1/0, a negative"),
    ("Load", load(experts=[tensor_pb2.ExpertRef()] * 2), INVALID, "experts: an expert is named twice"),
    ("Load", load(experts=[tensor_pb2.ExpertRef()] * (MAX_EXPERTS + 1)), INVALID, "experts: 262145, at most"),
    ("Load", load(optimizer=optimizer(name="lion")), INVALID, "optimizer.name: 'lion' is none of adamw, sgd"),
    ("Load", load(optimizer=optimizer(beta1=1.0)), INVALID, "optimizer: beta1"),
    ("Load", load(optimizer=optimizer(beta2=math.nan)), INVALID, "optimizer: beta1, beta2"),
    ("Load", load(optimizer=optimizer(momentum=-0.1)), INVALID, "momentum"),
    ("Load", load(optimizer=optimizer(eps=-1.0)), INVALID, "optimizer: eps"),
    ("Load", load(optimizer=optimizer(weight_decay=math.nan)), INVALID, "weight_decay"),
    ("Load", load(), grpc.StatusCode.FAILED_PRECONDITION, "/none: no such directory"),
    ("Load", load(checkpoint="/" + "x" * 5000), grpc.StatusCode.FAILED_PRECONDITION, "no such directory"),
    ("Load", load(checkpoint="/a\0b"), grpc.StatusCode.FAILED_PRECONDITION, "no such directory"),
    ("Load", load(peer_incarnation="a"), INVALID, "peer_address: missing"),
    ("Load", load(peer_address="127.0.0.1:1"), INVALID, "peer_incarnation: missing"),
    (
        "Load",
        load(peer_address="nowhere", peer_incarnation="a"),
        INVALID,
        "peer_address: 'nowhere', expected",
    ),
    ("Load", load(peer_address=":80", peer_incarnation="a"), INVALID, "peer_address: ':80', expected"),
    ("Load", load(peer_address="unix:/a:1", peer_incarnation="a"), INVALID, "peer_address: 'unix:/a:1', expected"),
    ("Load", load(peer_address="a:1\n", peer_incarnation="a"), INVALID, "peer_address: 'a:1\\n', expected"),
    ("Load", load(peer_address="x" * 400 + ":1", peer_incarnation="a"), INVALID, "peer_address: 'xxx"),
    (
        "Load",
        load(peer_address="127.0.0.1:1", peer_incarnation="a", optimizer=optimizer()),
        INVALID,
        "peer_address: experts are trained from a checkpoint on",
    ),
    ("Unload", expert_pb2.UnloadRequest(term=1, drain_timeout_s=-1.0), INVALID, "drain_timeout_s: -1.0, not within"),
    ("Unload", expert_pb2.UnloadRequest(term=1, drain_timeout_s=math.nan), INVALID, "drain_timeout_s: nan, not"),
    ("Unload", expert_pb2.UnloadRequest(term=1, drain_timeout_s=1e9), INVALID, "drain_timeout_s: 1000000000.0, not"),
    ("Unload", expert_pb2.UnloadRequest(term=1, experts=NEGATIVE), INVALID, "experts: -1/0, a negative"),
    ("Unload", expert_pb2.UnloadRequest(term=0), grpc.StatusCode.OUT_OF_RANGE, "controller term 0 is superseded"),
    (
        "SetPlacement",
        expert_pb2.SetPlacementRequest(term=0),
        grpc.StatusCode.OUT_OF_RANGE,
        "controller term 0 is superseded",
    ),
    (
        "SetPlacement",
        expert_pb2.SetPlacementRequest(term=1, snapshot=bytes(MAX_SNAPSHOT_BYTES + 1)),
        INVALID,
        "snapshot: 67108865 bytes, at most 67108864",
    ),
    (
        "SetPlacement",
        expert_pb2.SetPlacementRequest(term=1, weight_version=3, weight_versions=[1, 2]),
        INVALID,
        "weight_version: 3 is none of [1, 2]",
    ),
    (
        "SetPlacement",
        expert_pb2.SetPlacementRequest(term=1, weight_versions=[0]),
        INVALID,
        "weight_versions: they begin at 1",
    ),
    ("Export", expert_pb2.ExportRequest(incarnation="another"), grpc.StatusCode.OUT_OF_RANGE, "not another"),
    ("Export", expert_pb2.ExportRequest(experts=NEGATIVE), INVALID, "experts: -1/0, a negative"),
    (
        "Export",
        expert_pb2.ExportRequest(experts=[tensor_pb2.ExpertRef(layer=1)], weight_version=7),
        grpc.StatusCode.NOT_FOUND,
        "1/0 is not here in weight version 7",
    ),
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
    FieldDescriptor.CPPTYPE_STRING: ["", "adamw", "\0", "../..", "x" * 5000, "\N{SNOWMAN}", "127.0.0.1:1"],
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
        elif field.is_repeated:
            getattr(message, field.name).extend(rng.choices(EXTREMES[field.cpp_type], k=rng.choice([1, 3, 50])))
        else:
            value = rng.choice(EXTREMES[field.cpp_type])
            setattr(message, field.name, value.encode() if field.type == FieldDescriptor.TYPE_BYTES else value)


def test_orders_of_extreme_values_get_a_clear_status_and_break_nothing(checkpoint: Path) -> None:
    """A clear status is not UNKNOWN, which gRPC returns for an unhandled exception."""
    rng = random.Random(2)
    methods = expert_pb2.DESCRIPTOR.services_by_name["ExpertService"].methods
    seen: set[grpc.StatusCode] = set()
    with training(checkpoint) as service:
        server = serve_expert(service, credentials=None)
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
