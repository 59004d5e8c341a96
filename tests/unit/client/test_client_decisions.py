"""The client's decisions without I/O: where a request continues, for how long, and what it requests."""

from typing import Any

import pytest

from moecluster.client.cluster_client import CancelAnswers, Channels
from moecluster.client.failover import Route, Routers
from moecluster.errors import (
    BatchBroken,
    Exhausted,
    InvalidMessage,
    MoeClusterError,
    RequestFailed,
    StaleRequest,
    Unavailable,
)
from moecluster.generation import GenerationChunk, GenerationRequest
from moecluster.rpc.router.resume import ResumableRequest

LOST = Unavailable("lost")
STALE = StaleRequest("other weights")


def route(*addresses: str, patience_s: float = 0.0, timeout_s: float = 60.0, discovers: bool = False) -> Route:
    return Route(Routers(addresses), patience_s=patience_s, timeout_s=timeout_s, discovers=discovers)


def test_each_attempt_has_a_name_of_its_own_and_goes_on_behind_what_was_received() -> None:
    text = ResumableRequest(GenerationRequest(request_id="r", prompt="p", max_new_tokens=9))
    assert text.next_request() == GenerationRequest(request_id="r", prompt="p", max_new_tokens=9) and not text.grew
    text.take(GenerationChunk(ids=(4, 5), text="ab"))
    assert text.grew and text.request.request_id == "r"
    assert text.next_request() == text.request
    assert (text.request.request_id, text.request.generated_ids, text.grew) == ("r-1", (4, 5), False)
    assert text.next_request().request_id == "r-2"


def test_a_round_asks_every_router_once_and_then_where_they_are_now() -> None:
    way = route("a", "b", discovers=True)
    for _ in range(2):
        assert way.next()
        way.failed(LOST, generated=False)
    assert way.next() is None and way.wants_discovery()
    way.discovered(["c"])
    assert way.next() == "c" and way.next() is None and not way.wants_discovery()


def test_a_router_that_wrote_begins_a_new_round() -> None:
    way = route("a")
    assert way.next() == "a"
    way.failed(LOST, generated=True)
    assert way.next() == "a"
    way.failed(LOST, generated=False)
    assert way.next() is None


def test_no_pause_is_longer_than_patience_or_the_requests_deadline() -> None:
    full = Exhausted("full", retry_after_s=5.0)
    for patience_s, timeout_s, waits in ((60.0, 60.0, True), (4.0, 60.0, False), (60.0, 4.0, False)):
        way = route("a", patience_s=patience_s, timeout_s=timeout_s)
        assert way.next() == "a" and way.next() is None
        way.failed(full, generated=False)
        if waits:
            assert way.pause_s() == 5.0 and way.next() == "a"
        else:
            with pytest.raises(Exhausted):
                way.pause_s()


def test_weights_are_given_up_once_no_router_may_hold_them() -> None:
    way = route("a", "b", patience_s=60.0)
    assert way.next() and way.next()
    way.failed(STALE, generated=False)
    way.failed(LOST, generated=False)  # it may be back soon
    assert way.pause_s() > 0.0 and not way.any_version
    assert way.next() and way.next()
    way.failed(STALE, generated=False)
    way.failed(STALE, generated=False)
    assert way.pause_s() == 0.0 and way.any_version


def test_weights_are_given_up_when_patience_is_over() -> None:
    way = route("a", "b", patience_s=0.0)
    assert way.next() and way.next()
    way.failed(STALE, generated=False)
    way.failed(LOST, generated=False)
    assert way.pause_s() == 0.0 and way.any_version
    with pytest.raises(Unavailable):
        way.pause_s()


@pytest.mark.parametrize("error", [InvalidMessage("prompt", "wrong"), RequestFailed("it breaks every batch")])
def test_what_another_router_would_not_mend_is_raised_at_once(error) -> None:
    way = route("a", "b")
    way.next()
    with pytest.raises(type(error)):
        way.failed(error, generated=False)


@pytest.mark.parametrize("generated", [False, True])
def test_a_request_is_sent_on_after_few_broken_batches_only(generated) -> None:
    way, broken = route("a", "b", "c", "d"), BatchBroken("it broke")
    for _ in range(2):
        assert way.next()
        way.failed(broken, generated=generated)
    assert way.next()
    with pytest.raises(BatchBroken):
        way.failed(broken, generated=generated)


def test_a_connection_is_opened_once_and_given_up_with_its_address() -> None:
    opened: list[str] = []

    def open_channel(address: str) -> Any:
        opened.append(address)
        return f"to {address}"

    channels: Any = Channels(open_channel)
    assert [channels.to(address) for address in "aba"] == ["to a", "to b", "to a"] and opened == ["a", "b"]
    assert channels.keep(["b", "c"]) == ["to a"] and channels.to("b") == "to b"
    assert channels.close() == ["to b"] and channels.close() == []
    with pytest.raises(MoeClusterError, match="closed"):
        channels.to("b")


def test_a_cancel_is_answered_if_any_router_answers() -> None:
    answers = CancelAnswers()
    with pytest.raises(Unavailable, match="no router to ask"):
        answers.found()
    answers.add(False)
    assert not answers.found()
    answers.add(True)
    answers.add(False)
    assert answers.found()
