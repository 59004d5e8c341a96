"""Many threads share the streams to an actor: each gets its own rows, and none misses its wake-up."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import nn

from moecluster.rpc.same_host.mailbox import PeerMailbox
from tests.support.expert.small_actor import TIMEOUT_S, Connect, batch_of, check_rows, result_of

CALLERS, TURNS = 24, 20


@pytest.mark.parametrize("lost", [0, 3], ids=["all by mail", "every third round by the stream"])
def test_no_caller_is_left_asleep(
    connect: Connect, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """Replies arrive by mailbox and by stream, in any order, while threads wait, give up and take over."""
    transport = connect("shm")
    result_of(transport, batch_of())
    posts = 0
    really_post = PeerMailbox.post

    def post(peer: PeerMailbox, message: bytes) -> bool:
        nonlocal posts
        posts += 1
        return (not lost or posts % lost != 0) and really_post(peer, message)

    monkeypatch.setattr(PeerMailbox, "post", post)

    def call(caller: int) -> float:
        longest_s = 0.0
        for turn in range(TURNS):
            batch = batch_of(1 + (caller + turn) % 5, seed=100 * caller + turn)
            started_s = time.monotonic()
            future = transport.submit(batch)
            if turn % 4 == 3:  # gives up, as at a deadline, and comes back
                try:
                    result = future.result(0.0005)
                except TimeoutError:
                    result = future.result(TIMEOUT_S)
            else:
                result = future.result(TIMEOUT_S)
            longest_s = max(longest_s, time.monotonic() - started_s)
            check_rows(modules, batch, result)
        return longest_s

    with ThreadPoolExecutor(CALLERS) as callers:
        assert max(callers.map(call, range(CALLERS))) < TIMEOUT_S / 2
