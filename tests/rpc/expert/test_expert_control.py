"""Requests to an expert actor over loopback gRPC, and the server's standard services."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from moecluster.addresses import ListenAddress, split_host_port
from moecluster.errors import (
    AttemptAborted,
    CheckpointError,
    DeadlineExceeded,
    Exhausted,
    InvalidMessage,
    MoeClusterError,
    NotHosted,
    ResourceError,
    StaleRequest,
    StateLost,
    Unavailable,
    UserError,
)
from moecluster.expert.service import ExpertService
from moecluster.proto import expert_pb2
from moecluster.rpc.expert import export
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.rpc.expert.server import serve_expert
from moecluster.rpc.server import RunningServer
from moecluster.rpc.status_codes import error_of_reply, reply_code_of
from moecluster.types import ExpertId, MessageKey, MicroBatchTag, OptimizerSettings, Phase, StepTag
from tests.support.expert.batches import assert_same_fields
from tests.support.expert.small_actor import (
    EXPERTS,
    LAYER,
    TAG,
    TIMEOUT_S,
    Occupied,
    ask,
    batch_of,
    computing,
    open_stream,
    serving,
    submit,
    training,
    wait_for_rows,
)

SERVICE = "moecluster.v1.ExpertService"


@pytest.fixture
def trainer(checkpoint: Path) -> Iterator[ExpertService]:
    with training(checkpoint, optimizer=OptimizerSettings(weight_decay=0.1)) as service:
        yield service


@pytest.fixture
def server(trainer: ExpertService) -> Iterator[RunningServer]:
    server = serve_expert(trainer, credentials=None)
    yield server
    server.stop(0.0)


@pytest.fixture
def control(server: RunningServer) -> Iterator[GrpcExpertControl]:
    with closing(GrpcExpertControl("expert-0", server.address)) as control:
        yield control


def backward(service: ExpertService, tag: StepTag = TAG) -> MessageKey:
    """Gives the service the gradients of one message; returns its key."""
    ask(service, batch_of(3, phase=Phase.BACKWARD, train=MicroBatchTag(step=tag)))
    return MessageKey(rank=0, micro_batch=0, layer=LAYER, pass_index=0, rows=3)


# -- requests --


def test_status_says_what_the_actor_says(control: GrpcExpertControl, trainer: ExpertService) -> None:
    control.set_placement(PlacementNotice(term=2, generation=7, checkpoint="/somewhere"))
    first = control.status()
    assert (first.placement, first.checkpoint, first.experts) == ((2, 7), "/somewhere", EXPERTS)
    assert (first.prepared, first.committed, first.training_term) == (None, None, 1)
    key = backward(trainer)
    control.reduce(TAG, [key])
    control.prepare(TAG, clip_scale=1.0, learning_rate=0.1)
    prepared = control.status(training_term=5)
    assert (prepared.prepared, prepared.training_term) == (TAG, 5)
    control.commit(replace(TAG, term=5))  # a successor commits what its predecessor prepared
    for status in (first, prepared, control.status()):
        assert status.rss_bytes > 2**20
    assert_same_fields(replace(control.status(), rss_bytes=0), replace(trainer.status(), rss_bytes=0))
    assert control.status().committed == TAG


def test_the_snapshot_and_the_work_come_over_the_wire(control: GrpcExpertControl, trainer: ExpertService) -> None:
    snapshot = bytes(range(256)) * 2**18  # 64 MiB
    control.set_placement(PlacementNotice(term=2, generation=7, snapshot=snapshot))
    control.set_placement(PlacementNotice(term=2, generation=8))
    assert control.status().snapshot == b""
    assert control.status(with_snapshot=True).snapshot == snapshot
    with Occupied(trainer):
        submit(trainer, batch_of(4))
        wait_for_rows(trainer, 4)
        waiting = control.status().work
        assert_same_fields(waiting, trainer.status().work)
        assert waiting.queue_rows == 4
    ask(trainer, batch_of(1))
    work = control.status().work
    assert work.computed_rows >= 3 + 5 and work.batches >= 2 and work.busy_s > 0 and work.queue_wait_s > 0


def test_an_unload_over_the_wire_drains_first(trainer: ExpertService, server: RunningServer) -> None:
    with closing(GrpcExpertControl("expert-0", server.address, timeout_s=0.5)) as control:
        with Occupied(trainer):
            waits = submit(trainer, batch_of())
            control.unload(term=1, experts=EXPERTS[:1], drain_timeout_s=0.8)  # longer than other requests may take
            assert control.status().experts == EXPERTS[1:]
        with pytest.raises(NotHosted):
            waits.result(TIMEOUT_S)


def test_a_step_over_the_wire_equals_one_in_process(
    control: GrpcExpertControl, trainer: ExpertService, checkpoint: Path
) -> None:
    with training(checkpoint, optimizer=OptimizerSettings(weight_decay=0.1)) as local:
        key = backward(trainer)
        backward(local)
        over_the_wire, in_process = control.reduce(TAG, [key]), local.reduce(TAG, [key])
        assert over_the_wire.square_norm == in_process.square_norm > 0
        assert over_the_wire.incarnation == trainer.incarnation
        assert control.prepare(TAG, clip_scale=0.3, learning_rate=0.01) == trainer.incarnation
        local.prepare(TAG, clip_scale=0.3, learning_rate=0.01)
        assert control.commit(TAG) == trainer.incarnation
        local.commit(TAG)
        exported = list(control.export(experts=EXPERTS, with_optimizer=True, step=1))
        expected = list(local.export(experts=EXPERTS, with_optimizer=True, step=1))
        assert len(exported) == len(expected) > 2 * len(EXPERTS)
        for ours, theirs in zip(exported, expected, strict=True):
            assert_same_fields(ours, theirs)


def test_load_and_unload(control: GrpcExpertControl, checkpoint: Path) -> None:
    held = control.status().hosted_bytes
    control.unload(term=1, experts=EXPERTS[1:])
    assert control.status().experts == EXPERTS[:1]
    loaded = control.load(
        LoadRequest(
            term=1,
            experts=EXPERTS,
            checkpoint=str(checkpoint),
            optimizer=OptimizerSettings(name="sgd"),
            training_term=1,
        )
    )
    assert loaded == held * 3 // 4 and control.status().hosted_bytes == held
    assert (
        control.load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint), weight_version=4)) > 0
    )  # besides the other
    assert control.status().weight_version == 4


@pytest.mark.parametrize("chunk_bytes", [1, 100, 2**20])
def test_exported_tensors_are_whole_whatever_the_chunks(
    control: GrpcExpertControl, trainer: ExpertService, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(export, "CHUNK_BYTES", chunk_bytes)
    experts = EXPERTS[:1] if chunk_bytes == 1 else EXPERTS
    expected = trainer.export(experts=experts, with_optimizer=False)
    for ours, theirs in zip(control.export(experts=experts, with_optimizer=False), expected, strict=True):
        assert_same_fields(ours, theirs)
        if chunk_bytes == 1:
            break  # thousands of messages for one tensor are enough


def test_errors_keep_their_kind_over_the_wire(
    control: GrpcExpertControl, trainer: ExpertService, checkpoint: Path
) -> None:
    key = backward(trainer)
    with pytest.raises(AttemptAborted, match="1 unexpected messages"):
        control.reduce(TAG, [])
    with pytest.raises(StaleRequest, match="is not prepared here"):
        control.commit(TAG)
    with pytest.raises(StateLost, match="holds step 1 and was asked for step 3"):
        control.reduce(TAG, [key])
        control.prepare(TAG, clip_scale=1.0, learning_rate=0.1)
        control.commit(TAG)
        control.reduce(replace(TAG, step=3), [])
    with pytest.raises(NotHosted, match="expert 1/9 is not here"):
        list(control.export(experts=[ExpertId(layer=1, index=9)], with_optimizer=False))
    with pytest.raises(InvalidMessage, match="the model has no 1/9"):
        control.load(LoadRequest(term=1, experts=(ExpertId(layer=1, index=9),), checkpoint=str(checkpoint)))
    with pytest.raises(UserError, match="/nowhere: no such directory"):
        control.load(LoadRequest(term=1, experts=EXPERTS, checkpoint="/nowhere", replace=True))
    control.set_placement(PlacementNotice(term=9, generation=1))
    with pytest.raises(StaleRequest, match="controller term 1 is superseded"):
        control.unload(term=1, experts=EXPERTS)
    assert control.status().experts == EXPERTS


@pytest.mark.parametrize(
    "error",
    [
        InvalidMessage("", "x"),
        Exhausted("x"),
        NotHosted("x", placement=(0, 0)),
        StaleRequest("x"),
        DeadlineExceeded("x"),
        AttemptAborted("x"),
        StateLost("x"),
        Unavailable("x"),
        MoeClusterError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_stream_s_reply_codes_name_every_kind(error: MoeClusterError) -> None:
    back = error_of_reply(expert_pb2.BatchReply(code=reply_code_of(error), detail=str(error)))
    assert type(back) is type(error) and str(back) == "x"


def test_a_user_s_error_about_a_checkpoint_is_no_failure_of_the_actor() -> None:
    assert reply_code_of(CheckpointError("torn")) == expert_pb2.INTERNAL


def test_an_actor_that_does_not_answer_is_given_up_in_time(trainer: ExpertService, server: RunningServer) -> None:
    with closing(GrpcExpertControl("expert-0", server.address, timeout_s=0.2)) as control:
        with computing(trainer), pytest.raises(DeadlineExceeded):
            control.status()
        assert GrpcExpertControl("expert-0", server.address).status().actor == "expert-0"


def test_an_actor_that_is_gone_is_unavailable(trainer: ExpertService) -> None:
    server = serve_expert(trainer, credentials=None)
    control = GrpcExpertControl("expert-0", server.address, timeout_s=5.0)
    assert control.status().actor == "expert-0"
    server.stop(0.0)
    for order in (
        lambda: control.status(),
        lambda: list(control.export(experts=EXPERTS, with_optimizer=False)),
        lambda: control.commit(TAG),
    ):
        with pytest.raises(Unavailable):
            order()
    control.close()
    with pytest.raises(Unavailable, match="expert-0"):
        control.status()


# -- the server --


def test_health_and_reflection_answer(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        health: Any = HealthStub(channel)
        for name in ("", SERVICE):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="another"), timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
        file = database.FindFileContainingSymbol(SERVICE)
        assert {method.name for method in file.service[0].method} >= {"Compute", "Load", "Reduce", "Status"}


def test_a_server_that_stops_says_so_first(trainer: ExpertService) -> None:
    server = serve_expert(trainer, credentials=None)
    with grpc.insecure_channel(server.address) as channel:
        health: Any = HealthStub(channel)
        watched = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=TIMEOUT_S)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        stopping = threading.Thread(target=server.stop, args=(2.0,))
        stopping.start()
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched.cancel()
        stopping.join(TIMEOUT_S)
        assert not stopping.is_alive()


def test_a_port_in_use_is_a_users_error(trainer: ExpertService, server: RunningServer) -> None:
    host, port = split_host_port(server.address)
    with pytest.raises(ResourceError, match=f"cannot listen on {server.address}: the port is in use"):
        serve_expert(trainer, listen=ListenAddress(host=host, port=port), credentials=None)
    nobodys = ListenAddress(host="203.0.113.1")  # reserved for documentation
    with pytest.raises(ResourceError, match=r"cannot listen on 203\.0\.113\.1: it is no address of this machine"):
        serve_expert(trainer, listen=nobodys, credentials=None)
    assert GrpcExpertControl("expert-0", server.address).status().actor == "expert-0"


def open_when_there_is_room(address: str) -> GrpcExpertTransport:
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return open_stream(address)
        except Exhausted:  # the server notices a little later that a stream has ended
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_more_calls_than_are_allowed_are_backpressure(checkpoint: Path) -> None:
    with serving(checkpoint) as service:
        server = serve_expert(service, max_calls=2, credentials=None)
        streams = [open_stream(server.address) for _ in range(2)]
        with pytest.raises(Exhausted):
            open_stream(server.address)
        with closing(GrpcExpertControl("expert-0", server.address)) as control, pytest.raises(Exhausted):
            control.status()
        streams.pop().close()
        streams.append(open_when_there_is_room(server.address))
        assert streams[-1].incarnation == service.incarnation
        for stream in streams:
            stream.close()
        server.stop(0.0)
