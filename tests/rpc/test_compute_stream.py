"""The Compute stream over loopback gRPC: handshake, merging, ends of all kinds, and backpressure."""

import gc
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moecluster.errors import (
    DeadlineExceeded,
    Exhausted,
    InvalidMessage,
    MoeClusterError,
    NotHosted,
    StaleOrder,
    StateLost,
    Unavailable,
)
from moecluster.experts import compute
from moecluster.metrics import Metrics
from moecluster.proto import tensor_pb2
from moecluster.roles.expert_pool import ExpertPool, FixedPlacement
from moecluster.roles.expert_service import ExpertService
from moecluster.roles.remote_experts import RemoteExperts
from moecluster.rpc import codec
from moecluster.rpc.expert_server import serve_expert
from moecluster.rpc.expert_stream import GrpcExpertTransport
from moecluster.rpc.server import RunningServer
from moecluster.rpc.shared_memory import Segment
from moecluster.types import ActorAddress, ComputeBatch, ComputeResult, MicroBatchTag, Phase, Placement, Replica
from tests.batches import assert_same_fields, make_batch
from tests.small_actor import (
    EXPERTS,
    LAYER,
    SEGMENT_BYTES,
    TAG,
    TIMEOUT_S,
    WIDTH,
    Occupied,
    ask,
    batch_of,
    check_rows,
    load_modules,
    open_stream,
    save_small_model,
    serving,
    training,
    wait_for_rows,
)

TRANSPORTS = ("inline", "shm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def modules(checkpoint: Path) -> dict[int, nn.Module]:
    return load_modules(checkpoint)


@pytest.fixture
def service(checkpoint: Path) -> Iterator[ExpertService]:
    with serving(checkpoint) as service:
        yield service


@contextmanager
def served(service: ExpertService) -> Iterator[RunningServer]:
    server = serve_expert(service)
    try:
        yield server
    finally:
        server.stop(0.0)


@pytest.fixture
def server(service: ExpertService) -> Iterator[RunningServer]:
    with served(service) as server:
        yield server


Connect = Callable[..., GrpcExpertTransport]


@pytest.fixture
def connect(server: RunningServer) -> Iterator[Connect]:
    """open_stream to the served actor; closed at the end."""
    with ExitStack() as opened:

        def connect(*args: Any, **options: Any) -> GrpcExpertTransport:
            transport = open_stream(server.address, *args, **options)
            opened.callback(transport.close)
            return transport

        yield connect


def result_of(transport: GrpcExpertTransport, batch: ComputeBatch) -> ComputeResult:
    return transport.submit(batch).result(TIMEOUT_S)


# -- handshake --


@pytest.mark.parametrize("name", TRANSPORTS)
def test_rows_travel_as_the_handshake_chose(
    connect: Connect, service: ExpertService, modules: dict[int, nn.Module], name: str
) -> None:
    transport = connect(name)
    assert (transport.name, transport.incarnation) == (name, service.incarnation)
    for seed, rows in enumerate((1, 2, 40)):
        batch = batch_of(rows, seed=seed)
        result = result_of(transport, batch)
        check_rows(modules, batch, result)
        local = ask(service, batch)
        assert result.y_ND is not None and local.y_ND is not None
        assert torch.equal(result.y_ND, local.y_ND)


def offer_of(pid: int, fd: int) -> Callable[[Segment], tensor_pb2.SegmentOffer]:
    return lambda segment: tensor_pb2.SegmentOffer(pid=pid, fd=fd, size_bytes=segment.size_bytes)


def test_a_router_whose_process_cannot_be_seen_sends_inline(
    connect: Connect, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another host, or another process namespace: the number names no process here."""
    monkeypatch.setattr(Segment, "offer", offer_of(pid=2**31 - 1, fd=5))
    transport = connect("shm")
    assert transport.name == "inline"
    check_rows(modules, batch_of(5), result_of(transport, batch_of(5)))


def test_a_router_whose_number_names_another_process_sends_inline(
    connect: Connect, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor opens a segment, but not the router's: the nonce tells."""
    someone_else = Segment(SEGMENT_BYTES)
    monkeypatch.setattr(Segment, "offer", offer_of(pid=os.getpid(), fd=someone_else.fd))
    transport = connect("shm")
    assert transport.name == "inline"
    check_rows(modules, batch_of(5), result_of(transport, batch_of(5)))
    someone_else.close()


def test_a_router_without_room_for_a_segment_sends_inline(connect: Connect, modules: dict[int, nn.Module]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SEGMENT_BYTES // 2, hard))
    try:
        transport = connect("shm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert transport.name == "inline"
    check_rows(modules, batch_of(5), result_of(transport, batch_of(5)))


def test_replies_travel_inline_when_only_the_router_has_a_segment(
    connect: Connect, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor reads the router's rows in place, but the router cannot open the actor's segment."""
    offers = [None, offer_of(pid=2**31 - 1, fd=5)]
    really_offer = Segment.offer

    def offer(segment: Segment) -> tensor_pb2.SegmentOffer:
        other = offers.pop(0)
        return really_offer(segment) if other is None else other(segment)

    monkeypatch.setattr(Segment, "offer", offer)
    transport = connect("shm")
    assert transport.name == "shm" and offers == []
    for _ in range(2):
        check_rows(modules, batch_of(5), result_of(transport, batch_of(5)))


def test_another_life_of_the_actor_is_refused_at_the_handshake(connect: Connect, service: ExpertService) -> None:
    with pytest.raises(StaleOrder, match=f"expert-0 is incarnation {service.incarnation}, not before"):
        connect(incarnation="before")
    assert connect(incarnation="").incarnation == service.incarnation


def test_nobody_at_the_address_is_unavailable_in_time() -> None:
    started_s = time.monotonic()
    with pytest.raises(Unavailable):
        GrpcExpertTransport(
            ActorAddress(actor="expert-0", address="127.0.0.1:1", incarnation=""),
            router="test",
            shared_memory_bytes=SEGMENT_BYTES,
            connect_timeout_s=0.5,
        )
    assert time.monotonic() - started_s < 5.0


# -- shared memory in use --


def test_regions_are_given_back_by_both_sides(
    connect: Connect, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of many batches finds room in segments that hold only a few."""
    written: list[bool] = []
    really_write = Segment.write

    def write(segment: Segment, value: torch.Tensor) -> object:
        region = really_write(segment, value)
        written.append(region is not None)
        return region

    monkeypatch.setattr(Segment, "write", write)
    transport = connect("shm", shared_memory_bytes=64 * 1024)
    batch = batch_of(64)  # 8 KiB of rows
    for _ in range(60):
        check_rows(modules, batch, result_of(transport, batch))
    assert written.count(True) >= 2 * 60 - 2 and written.count(False) <= 2, "the first reply may still go inline"


def test_what_does_not_fit_the_segment_goes_inline(connect: Connect, modules: dict[int, nn.Module]) -> None:
    transport = connect("shm", shared_memory_bytes=4096)
    small, large = batch_of(3, seed=1), batch_of(300, seed=2)
    for batch in (small, large, small):
        check_rows(modules, batch, result_of(transport, batch))


def test_a_segment_too_small_for_what_is_in_flight_slows_nobody_down(
    connect: Connect, service: ExpertService, modules: dict[int, nn.Module]
) -> None:
    transport = connect("shm", shared_memory_bytes=16 * 1024)
    batches = [batch_of(20, seed=seed) for seed in range(20)]
    with Occupied(service):
        futures = [transport.submit(batch) for batch in batches]
    for batch, future in zip(batches, futures, strict=True):
        check_rows(modules, batch, future.result(TIMEOUT_S))


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_streams_that_end_leave_no_descriptor_open(server: RunningServer) -> None:
    def use_a_stream() -> None:
        transport = open_stream(server.address)
        assert result_of(transport, batch_of()).y_ND is not None
        transport.close()

    use_a_stream()
    before = open_descriptors()
    for _ in range(10):
        use_a_stream()
    deadline_s = time.monotonic() + TIMEOUT_S
    while open_descriptors() > before + 2 and time.monotonic() < deadline_s:
        time.sleep(0.1)  # the server notices a little later that a stream has ended
    assert open_descriptors() <= before + 2  # of 40; gRPC's own come and go


# -- many routers --


@pytest.mark.parametrize("name", TRANSPORTS)
def test_batches_of_several_routers_are_computed_at_once(
    connect: Connect,
    service: ExpertService,
    modules: dict[int, nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    merged: list[int] = []
    really_forward = compute.forward

    def watched(
        experts: dict[int, nn.Module], batches: Sequence[ComputeBatch], run: compute.RunExpert
    ) -> list[ComputeResult]:
        merged.append(sum(len(batch.x_ND) for batch in batches))
        return really_forward(experts, batches, run)

    monkeypatch.setattr(compute, "forward", watched)
    routers = [connect(name) for _ in range(4)]
    batches = [batch_of(rows, seed=rows) for rows in (1, 2, 3, 4)]
    with Occupied(service):
        futures = [router.submit(batch) for router, batch in zip(routers, batches, strict=True)]
        wait_for_rows(service, 10)
    for batch, future in zip(batches, futures, strict=True):
        check_rows(modules, batch, future.result(TIMEOUT_S))
    assert merged == [2, 10]  # what occupied it, and then all routers' rows in one go


@pytest.mark.parametrize("name", TRANSPORTS)
def test_answers_find_their_requests_when_threads_share_a_stream(
    connect: Connect, modules: dict[int, nn.Module], name: str
) -> None:
    transport = connect(name)

    def work(worker: int) -> None:
        for turn in range(15):
            batch = batch_of(1 + (worker + turn) % 5, seed=100 * worker + turn)
            check_rows(modules, batch, result_of(transport, batch))

    with ThreadPoolExecutor(6) as workers:
        list(workers.map(work, range(6)))


# -- ends --


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_server_that_goes_fails_what_is_in_flight_and_what_comes_after(
    checkpoint: Path, modules: dict[int, nn.Module], name: str
) -> None:
    with serving(checkpoint) as service, served(service) as server:
        transport = open_stream(server.address, name, incarnation=service.incarnation)
        with Occupied(service):
            futures = [transport.submit(batch_of(seed=seed)) for seed in range(3)]
            server.stop(0.0)
            for future in futures:
                with pytest.raises(Unavailable, match="stream to expert-0"):
                    future.result(TIMEOUT_S)
        with pytest.raises(Unavailable):
            transport.submit(batch_of()).result(TIMEOUT_S)
        transport.close()
        check_rows(modules, batch_of(), ask(service, batch_of()))


def test_closing_fails_what_is_in_flight_and_the_actor_serves_others(
    connect: Connect, service: ExpertService, modules: dict[int, nn.Module]
) -> None:
    leaving, staying = connect("shm"), connect("shm")
    with Occupied(service):
        future = leaving.submit(batch_of())
        leaving.close()
        with pytest.raises(Unavailable, match="the stream to expert-0 was closed"):
            future.result(TIMEOUT_S)
    with pytest.raises(Unavailable):
        leaving.submit(batch_of()).result(TIMEOUT_S)
    check_rows(modules, batch_of(), result_of(staying, batch_of()))


def test_a_batch_that_waited_beyond_its_deadline_is_answered_so(connect: Connect, service: ExpertService) -> None:
    transport = connect("shm")
    with Occupied(service):
        future = transport.submit(batch_of(deadline_s=0.01))
        time.sleep(0.05)
    with pytest.raises(DeadlineExceeded, match="waited longer than its deadline"):
        future.result(TIMEOUT_S)


def test_errors_keep_their_kind_over_the_stream(connect: Connect, service: ExpertService) -> None:
    transport = connect("shm")
    service.set_placement(term=4, generation=9)
    with pytest.raises(NotHosted, match=r"experts \[9\] of layer 1") as caught:
        result_of(transport, make_batch({9: [0]}, rows=1, width=WIDTH, layer=LAYER))
    assert caught.value.placement == (4, 9)
    with pytest.raises(StaleOrder, match="not before"):
        result_of(transport, batch_of(incarnation="before"))
    with pytest.raises(StaleOrder, match="weight version 7"):
        result_of(transport, batch_of(weight_version=7))
    with pytest.raises(InvalidMessage, match=r"x\.shape: rows of 7"):
        result_of(transport, make_batch({0: [0]}, rows=1, width=7, layer=LAYER))
    with pytest.raises(StateLost, match="expert-0 trains nothing"):
        result_of(transport, batch_of(phase=Phase.TRAIN_FORWARD))
    assert result_of(transport, batch_of()).y_ND is not None


def test_an_expert_s_own_failure_is_no_user_s_error(
    connect: Connect, service: ExpertService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*args: object) -> list[ComputeResult]:
        raise RuntimeError("no kernel")

    transport = connect("inline")
    with monkeypatch.context() as patched:
        patched.setattr(compute, "forward", raising)
        with pytest.raises(MoeClusterError, match="the computation failed: no kernel") as caught:
            result_of(transport, batch_of())
    assert type(caught.value) is MoeClusterError
    assert result_of(transport, batch_of()).y_ND is not None


def test_a_batch_larger_than_a_message_is_refused_before_it_is_sent(
    connect: Connect, modules: dict[int, nn.Module]
) -> None:
    transport = connect("inline")
    rows = codec.MAX_MESSAGE_BYTES // (4 * WIDTH) + 1
    x_ND = torch.zeros(1, WIDTH).expand(rows, WIDTH)  # takes no memory
    with pytest.raises(InvalidMessage, match=rf"x: \d+ bytes in one message, at most {codec.MAX_CONTENT_BYTES}"):
        transport.submit(batch_of(x_ND=x_ND))
    check_rows(modules, batch_of(), result_of(transport, batch_of()))


@pytest.mark.parametrize("name", TRANSPORTS)
def test_training_passes_travel_both_ways(checkpoint: Path, modules: dict[int, nn.Module], name: str) -> None:
    backward = batch_of(6, phase=Phase.BACKWARD, train=MicroBatchTag(step=TAG))
    forward = replace(backward, phase=Phase.TRAIN_FORWARD, grad_ND=None)
    with training(checkpoint) as local:
        expected = [ask(local, forward), ask(local, backward)]
    with training(checkpoint) as service, served(service) as server:
        transport = open_stream(server.address, name, incarnation=service.incarnation)
        for batch, result in zip((forward, backward), expected, strict=True):
            got = result_of(transport, replace(batch, incarnation=service.incarnation))
            assert_same_fields(replace(got, request_id=0), result)
        transport.close()


# -- backpressure and deadlines, as a router meets them --


@contextmanager
def remote_experts(
    server: RunningServer, service: ExpertService, *, timeout_s: float, metrics: Metrics | None = None
) -> Iterator[RemoteExperts]:
    placement = Placement(
        term=1,
        generation=1,
        layer_experts={LAYER: len(EXPERTS)},
        actors={"expert-0": ActorAddress(actor="expert-0", address=server.address, incarnation=service.incarnation)},
        replicas=tuple(Replica(expert=expert, actor="expert-0") for expert in EXPERTS),
    )

    def connect(address: ActorAddress) -> GrpcExpertTransport:
        return GrpcExpertTransport(address, router="test", shared_memory_bytes=SEGMENT_BYTES, connect_timeout_s=2.0)

    pool = ExpertPool(FixedPlacement(placement), connect=connect, control=lambda address: service)
    remote = RemoteExperts(pool, timeout_s=timeout_s, metrics=metrics)
    try:
        yield remote
    finally:
        remote.close()


def one_token(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, WIDTH, generator=generator), torch.tensor([[0, 2]]), torch.tensor([[0.75, 0.25]])


@torch.no_grad()
def expected_token(modules: dict[int, nn.Module], seed: int) -> torch.Tensor:
    x_TD = one_token(seed)[0]
    y_TD: torch.Tensor = 0.75 * modules[0](x_TD) + 0.25 * modules[2](x_TD)
    return y_TD


def wait_for_retries(metrics: Metrics, reason: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while f'reason="{reason}"' not in metrics.render() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    assert f'reason="{reason}"' in metrics.render()


def test_backpressure_is_retried_until_there_is_room(checkpoint: Path, modules: dict[int, nn.Module]) -> None:
    metrics = Metrics(model="m")
    with (
        serving(checkpoint, max_queue_bytes=WIDTH * 4) as service,
        served(service) as server,
        remote_experts(server, service, timeout_s=TIMEOUT_S, metrics=metrics) as remote,
        ThreadPoolExecutor(8) as callers,
    ):

        @torch.no_grad()
        def call(seed: int) -> torch.Tensor:
            return remote(LAYER, *one_token(seed))

        with Occupied(service):
            calls: list[Future[torch.Tensor]] = [callers.submit(call, seed) for seed in range(8)]
            wait_for_retries(metrics, "exhausted")
        for seed, outcome in enumerate(calls):
            torch.testing.assert_close(outcome.result(TIMEOUT_S), expected_token(modules, seed), atol=5e-6, rtol=0)


def test_a_full_queue_refuses_over_the_stream_at_once(checkpoint: Path) -> None:
    with serving(checkpoint, max_queue_bytes=WIDTH * 4) as service, served(service) as server:
        transport = open_stream(server.address)
        with Occupied(service):
            futures = [transport.submit(batch_of(1, seed=seed)) for seed in range(5)]
            for future in futures[1:]:
                with pytest.raises(Exhausted, match="128 bytes wait, at most 128"):
                    future.result(TIMEOUT_S)
        assert futures[0].result(TIMEOUT_S).y_ND is not None
        transport.close()


@torch.no_grad()
def test_an_actor_that_hangs_is_given_up_at_the_deadline(service: ExpertService, server: RunningServer) -> None:
    with remote_experts(server, service, timeout_s=0.3) as remote, Occupied(service):
        started_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            remote(LAYER, *one_token(0))
        assert 0.25 < time.monotonic() - started_s < 3.0


def test_a_stream_that_breaks_is_opened_anew_and_the_batch_is_sent_again(
    service: ExpertService, server: RunningServer, modules: dict[int, nn.Module]
) -> None:
    with remote_experts(server, service, timeout_s=TIMEOUT_S) as remote, ThreadPoolExecutor(1) as caller:

        @torch.no_grad()
        def call() -> torch.Tensor:
            return remote(LAYER, *one_token(1))

        with Occupied(service):
            outcome = caller.submit(call)
            wait_for_rows(service, 1)
            remote.pool.transport(remote.pool.placement().actors["expert-0"]).close()
            wait_for_rows(service, 2)  # asked again; nobody waits for the first answer any more
        torch.testing.assert_close(outcome.result(TIMEOUT_S), expected_token(modules, 1), atol=5e-6, rtol=0)
