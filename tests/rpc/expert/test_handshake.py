"""Shared memory or inline: chosen by what each side can read of the other, and freed when a stream ends."""

import errno
import gc
import os
import resource
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from moecluster.errors import StaleRequest, Unavailable
from moecluster.expert.service import ExpertService
from moecluster.proto import tensor_pb2
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.rpc.same_host.segment import Segment
from moecluster.rpc.server import RunningServer
from moecluster.types import ActorAddress
from tests.support.expert.small_actor import (
    SEGMENT_BYTES,
    TIMEOUT_S,
    TRANSPORTS,
    Connect,
    Occupied,
    ask,
    batch_of,
    check_rows,
    open_stream,
    result_of,
)
from tests.support.waiting import wait_until


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
    """Like a router on another host or in another PID namespace: its pid does not exist here."""
    monkeypatch.setattr(Segment, "offer", offer_of(pid=2**31 - 1, fd=5))
    transport = connect("shm")
    assert (transport.name, transport.reason) == ("inline", "not_shared")
    check_rows(modules, batch_of(5), result_of(transport, batch_of(5)))


def test_a_router_whose_number_names_another_process_sends_inline(
    connect: Connect, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor opens a segment other than the router's, which the nonce reveals."""
    someone_else = Segment(SEGMENT_BYTES)
    monkeypatch.setattr(Segment, "offer", offer_of(pid=os.getpid(), fd=someone_else.fd))
    transport = connect("shm")
    assert (transport.name, transport.reason) == ("inline", "not_shared")
    check_rows(modules, batch_of(5), result_of(transport, batch_of(5)))
    someone_else.close()


def test_a_router_without_room_for_a_segment_sends_inline(connect: Connect, modules: dict[int, nn.Module]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SEGMENT_BYTES // 2, hard))
    try:
        transport = connect("shm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (transport.name, transport.reason) == ("inline", "no_memory")
    assert transport.shortage == f"the router: {SEGMENT_BYTES} bytes of memory to share cannot be had (File too large)"
    check_rows(modules, batch_of(5), result_of(transport, batch_of(5)))


def test_an_actor_without_room_for_a_segment_answers_inline_and_says_why(
    connect: Connect, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    really_create, created = os.memfd_create, []

    def create(name: str, flags: int) -> int:
        created.append(name)
        if len(created) == 2:  # the router's is the first
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return really_create(name, flags)

    monkeypatch.setattr(os, "memfd_create", create)
    transport = connect("shm")
    assert transport.name == "inline" and len(created) == 2
    why = "memory to share cannot be had (Cannot allocate memory)"
    assert transport.shortage == f"the actor: {SEGMENT_BYTES} bytes of {why}"
    check_rows(modules, batch_of(5), result_of(transport, batch_of(5)))


def test_a_router_on_another_host_lacks_nothing(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segment, "offer", offer_of(pid=2**31 - 1, fd=5))
    assert (connect("shm").name, connect("shm").shortage) == ("inline", "")
    assert connect("inline").shortage == ""


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
    assert (transport.name, transport.reason) == ("shm", "replies_inline") and offers == []
    for _ in range(2):
        check_rows(modules, batch_of(5), result_of(transport, batch_of(5)))


def test_another_incarnation_of_the_actor_is_refused_at_the_handshake(connect: Connect, service: ExpertService) -> None:
    with pytest.raises(StaleRequest, match=f"expert-0 is incarnation {service.incarnation}, not before"):
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


def test_regions_are_given_back_by_both_sides(
    connect: Connect, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments that hold only a few batches have room for many in sequence."""
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
    # The server notices a little later that a stream has ended. 2 of 40: gRPC's own come and go.
    wait_until(lambda: open_descriptors() <= before + 2, "the end of all descriptors")
