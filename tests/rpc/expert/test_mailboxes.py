"""Mailboxes for short messages on one host: which messages use them, and the fallback to the stream."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from torch import nn

from moecluster.errors import DeadlineExceeded, Unavailable
from moecluster.expert import compute
from moecluster.expert.service import ExpertService
from moecluster.rpc.expert import compute_session, compute_stream
from moecluster.rpc.same_host import mailbox
from moecluster.rpc.same_host.mailbox import Mailbox, MailboxUnavailable, PeerMailbox
from moecluster.types import ComputeBatch, ComputeResult
from tests.support.expert.small_actor import (
    TIMEOUT_S,
    Connect,
    Occupied,
    batch_of,
    check_rows,
    open_stream,
    result_of,
    served,
    serving,
    wait_for_rows,
)
from tests.support.waiting import wait_until


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every message of both sides so far, whether the mailbox took it."""
    outcomes: list[bool] = []
    really_post = PeerMailbox.post

    def post(peer: PeerMailbox, message: bytes) -> bool:
        outcomes.append(really_post(peer, message))
        return outcomes[-1]

    monkeypatch.setattr(PeerMailbox, "post", post)
    return outcomes


def check_posted(posted: list[bool], expected: int) -> None:
    """Who posts notes it a little after the other has the message."""
    wait_until(lambda: len(posted) >= expected, f"the post of message {expected}")
    assert posted == [True] * expected


def check_some(modules: dict[int, nn.Module], transport: compute_stream.GrpcExpertTransport, calls: int = 4) -> None:
    for seed in range(calls):
        batch = batch_of(1 + seed, seed=seed)
        check_rows(modules, batch, result_of(transport, batch))


def test_all_but_the_first_message_goes_by_mail(
    connect: Connect, modules: dict[int, nn.Module], posted: list[bool]
) -> None:
    check_some(modules, connect("shm"), calls=5)
    check_posted(posted, 5 + 4)  # an actor learns from the first message that its mailbox is read


def test_between_hosts_nothing_goes_by_mail(
    connect: Connect, modules: dict[int, nn.Module], posted: list[bool]
) -> None:
    check_some(modules, connect("inline"))
    assert posted == []


def test_long_messages_go_on_the_stream(connect: Connect, modules: dict[int, nn.Module], posted: list[bool]) -> None:
    transport = connect("shm")
    check_some(modules, transport, calls=1)
    batch = batch_of(2000)  # of 8 bytes a pair
    check_rows(modules, batch, result_of(transport, batch))
    check_posted(posted, 2)  # both replies, neither request


def test_full_mailboxes_send_messages_round_by_the_stream(
    connect: Connect, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeerMailbox, "post", lambda peer, message: False)
    check_some(modules, connect("shm"))


@pytest.mark.parametrize("end", [compute_session, compute_stream])
@pytest.mark.parametrize("name", ["Mailbox", "PeerMailbox"])
def test_who_has_no_mailbox_uses_the_stream(
    connect: Connect, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch, end: object, name: str
) -> None:
    def unavailable(*args: object) -> mailbox.Mailbox:
        raise MailboxUnavailable("no pipes here")

    monkeypatch.setattr(end, name, unavailable)
    transport = connect("shm")
    assert (transport.name, transport.reason) == ("shm", "best")
    check_some(modules, transport)


def test_batches_of_one_router_that_lie_in_the_mailbox_are_computed_at_once(
    connect: Connect, service: ExpertService, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = connect("shm")
    check_some(modules, transport, calls=1)
    merged: list[int] = []
    really_forward = compute.forward

    def watched(
        experts: dict[int, nn.Module], batches: Sequence[ComputeBatch], run: compute.RunExpert
    ) -> list[ComputeResult]:
        merged.append(sum(len(batch.x_ND) for batch in batches))
        return really_forward(experts, batches, run)

    monkeypatch.setattr(compute, "forward", watched)
    batches = [batch_of(rows, seed=rows) for rows in (1, 2, 3, 4)]
    with Occupied(service):
        futures = [transport.submit(batch) for batch in batches]
        wait_for_rows(service, 10)
    for batch, future in zip(batches, futures, strict=True):
        check_rows(modules, batch, future.result(TIMEOUT_S))
    assert merged == [2, 10]


def test_answers_that_nobody_waited_for_are_in_nobody_s_way(
    connect: Connect, service: ExpertService, modules: dict[int, nn.Module]
) -> None:
    transport = connect("shm")
    check_some(modules, transport, calls=1)
    given_up = [transport.submit(batch_of(seed=seed)) for seed in range(100)]  # more than a mailbox holds
    check_some(modules, transport)
    for seed, future in enumerate(given_up):
        check_rows(modules, batch_of(seed=seed), future.result(TIMEOUT_S))


def test_a_wait_ends_with_its_timeout_and_another_thread_s_goes_on(
    connect: Connect, service: ExpertService, modules: dict[int, nn.Module]
) -> None:
    transport = connect("shm")
    check_some(modules, transport, calls=1)
    with ThreadPoolExecutor(2) as waiting, Occupied(service):
        patient = transport.submit(batch_of(seed=1))
        hasty = transport.submit(batch_of(seed=2))
        first = waiting.submit(hasty.result, 0.2)
        second = waiting.submit(patient.result, TIMEOUT_S)
        with pytest.raises(TimeoutError):
            first.result(TIMEOUT_S)
        assert not second.done()
        third = waiting.submit(hasty.result, TIMEOUT_S)
    check_rows(modules, batch_of(seed=1), second.result(TIMEOUT_S))
    check_rows(modules, batch_of(seed=2), third.result(TIMEOUT_S))


def waiting_on(
    transport: compute_stream.GrpcExpertTransport,
) -> "tuple[list[Future[ComputeResult]], ThreadPoolExecutor]":
    """Three threads that wait for answers of an occupied actor. Returns once one of them reads the mailbox."""
    threads = ThreadPoolExecutor(3, thread_name_prefix="waiting-on")
    reads, really_receive = threading.Event(), Mailbox.receive

    def watched(mailbox: Mailbox, timeout_s: float | None = None) -> bytes | None:
        if threading.current_thread().name.startswith("waiting-on"):  # and not the actor's own
            reads.set()
        return really_receive(mailbox, timeout_s)

    with patch.object(Mailbox, "receive", watched):
        waits = [threads.submit(transport.submit(batch_of(seed=seed)).result, TIMEOUT_S) for seed in range(3)]
        assert reads.wait(TIMEOUT_S)
    return waits, threads


def test_closing_ends_all_who_wait(connect: Connect, service: ExpertService, modules: dict[int, nn.Module]) -> None:
    transport = connect("shm")
    check_some(modules, transport, calls=1)
    with Occupied(service):
        waits, threads = waiting_on(transport)
        transport.close()
        for wait in waits:
            with pytest.raises(Unavailable, match="the stream to expert-0 was closed"):
                wait.result(TIMEOUT_S / 2)
    threads.shutdown()


def test_a_server_that_goes_ends_all_who_wait(checkpoint: Path, modules: dict[int, nn.Module]) -> None:
    with serving(checkpoint) as service, served(service) as server:
        transport = open_stream(server.address)
        check_some(modules, transport, calls=1)
        with Occupied(service):
            waits, threads = waiting_on(transport)
            server.stop(0.0)
            for wait in waits:
                with pytest.raises(Unavailable, match="stream to expert-0"):
                    wait.result(TIMEOUT_S / 2)
        threads.shutdown()
        transport.close()


def posting(*, requests: bytes | None = None, replies: bytes | None = None) -> Callable[[PeerMailbox, bytes], bool]:
    """PeerMailbox.post with other contents. Requests are posted by the test's own thread, replies by the actor's."""
    really_post = PeerMailbox.post

    def post(peer: PeerMailbox, message: bytes) -> bool:
        other = requests if threading.current_thread() is threading.main_thread() else replies
        return really_post(peer, message if other is None else other)

    return post


@pytest.mark.parametrize("message", [b"\xff\xff\xff", b"\x00\x00", b"\x0a\xff\x01"])
def test_a_message_that_is_no_message_ends_the_stream_and_the_actor_serves_others(
    connect: Connect, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch, message: bytes
) -> None:
    bad, good = connect("shm"), connect("shm")
    check_some(modules, bad, calls=1)
    with monkeypatch.context() as patches:
        patches.setattr(PeerMailbox, "post", posting(requests=message))
        with pytest.raises(Unavailable):
            result_of(bad, batch_of())
    check_some(modules, good)


def test_answers_that_are_no_messages_fail_what_is_in_flight(
    connect: Connect, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = connect("shm")
    check_some(modules, transport, calls=1)
    monkeypatch.setattr(PeerMailbox, "post", posting(replies=b"\xff\xff"))
    with pytest.raises(Unavailable, match="holds no messages"):
        result_of(transport, batch_of())


def test_a_batch_computed_by_the_stream_s_own_thread_leaves_the_service_free(
    connect: Connect, service: ExpertService, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream's thread computes small batches, the service's own thread large ones; only one computes at a time."""
    threads: list[str] = []
    really_forward = compute.forward

    def watched(
        experts: dict[int, nn.Module], batches: Sequence[ComputeBatch], run: compute.RunExpert
    ) -> list[ComputeResult]:
        threads.append(threading.current_thread().name)
        assert service.is_computing
        return really_forward(experts, batches, run)

    transport = connect("shm")
    check_some(modules, transport, calls=1)
    wait_until(lambda: not service.is_computing, "the end of the last batch")  # it is answered a little before
    monkeypatch.setattr(compute, "forward", watched)
    for rows in (3, 300):
        check_rows(modules, batch_of(rows), result_of(transport, batch_of(rows)))
    assert threads == ["compute-mailbox", "compute-expert-0"]


def test_a_hanging_actor_is_given_up_at_the_deadline(connect: Connect, service: ExpertService) -> None:
    transport = connect("shm")
    result_of(transport, batch_of())
    with Occupied(service):
        late = transport.submit(batch_of(deadline_s=0.01))
        time.sleep(0.05)
    with pytest.raises(DeadlineExceeded, match="waited longer than its deadline"):
        late.result(TIMEOUT_S)
