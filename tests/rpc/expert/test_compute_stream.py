"""The Compute stream over loopback gRPC: merging across routers, and all ways in which a stream ends."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from moecluster.errors import (
    DeadlineExceeded,
    InvalidMessage,
    MoeClusterError,
    NotHosted,
    StaleRequest,
    StateLost,
    Unavailable,
)
from moecluster.expert import compute
from moecluster.expert.service import ExpertService
from moecluster.rpc.expert import messages
from moecluster.rpc.expert.requests import PlacementNotice
from moecluster.rpc.fields import MAX_MESSAGE_BYTES
from moecluster.rpc.server import RunningServer
from moecluster.types import ComputeBatch, ComputeResult, MicroBatchTag, Phase
from tests.support.expert.batches import assert_same_fields, make_batch
from tests.support.expert.small_actor import (
    LAYER,
    TAG,
    TIMEOUT_S,
    TRANSPORTS,
    WIDTH,
    Connect,
    Occupied,
    ask,
    batch_of,
    check_rows,
    open_stream,
    result_of,
    served,
    serving,
    training,
    wait_for_rows,
)
from tests.support.waiting import wait_until


def held_by_streams() -> tuple[int, int]:
    """Mapped segments and open descriptors of this process."""
    mapped = Path("/proc/self/maps").read_text().count("memfd:moecluster-rows")
    return mapped, len(os.listdir("/proc/self/fd"))


def wait_for_held(expected: tuple[int, int]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while held_by_streams() != expected and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert held_by_streams() == expected


@pytest.mark.usefixtures("without_collector")
def test_nothing_is_held_for_a_router_that_is_gone(server: RunningServer, modules: dict[int, nn.Module]) -> None:
    with closing(open_stream(server.address)):  # gRPC keeps its own descriptors from its first connection on
        before = held_by_streams()
        transport = open_stream(server.address)
        assert held_by_streams()[0] == before[0] + 4  # in one process: each side's segment, mapped by both
        for rows in (2, 200):
            check_rows(modules, batch_of(rows), result_of(transport, batch_of(rows)))
        transport.close()
        wait_for_held(before)


@pytest.mark.usefixtures("without_collector")
def test_nothing_is_held_for_an_actor_that_is_gone(service: ExpertService, modules: dict[int, nn.Module]) -> None:
    with served(service) as server:
        transport = open_stream(server.address)
        check_rows(modules, batch_of(), result_of(transport, batch_of()))

    def is_gone() -> bool:
        """Messages through the mailbox are answered until the actor's end of the stream has seen its end, too."""
        try:
            result_of(transport, batch_of())
        except Unavailable:
            return True
        return False

    wait_until(is_gone, "the end of the stream")
    transport.close()
    wait_until(lambda: held_by_streams()[0] == 0, "the release of all segments")


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
    assert merged == [2, 10]  # the batch that occupied it, then all routers' rows at once


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
    service.set_placement(PlacementNotice(term=4, generation=9))
    with pytest.raises(NotHosted, match=r"experts \[9\] of layer 1") as caught:
        result_of(transport, make_batch({9: [0]}, rows=1, width=WIDTH, layer=LAYER))
    assert caught.value.placement == (4, 9)
    with pytest.raises(StaleRequest, match="not before"):
        result_of(transport, batch_of(incarnation="before"))
    with pytest.raises(NotHosted, match="weight version 7"):
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
    rows = MAX_MESSAGE_BYTES // (4 * WIDTH) + 1
    x_ND = torch.zeros(1, WIDTH).expand(rows, WIDTH)  # takes no memory
    with pytest.raises(InvalidMessage, match=rf"x: \d+ bytes in one message, at most {messages.MAX_CONTENT_BYTES}"):
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
