"""The rules by which a request continues on another router, or ends."""

import pytest

from moecluster.errors import (
    BatchBroken,
    CheckpointError,
    DeadlineExceeded,
    Exhausted,
    ExpertsLost,
    InvalidMessage,
    MoeClusterError,
    RequestFailed,
    StaleRequest,
    Unavailable,
)
from moecluster.rpc.router import failover
from moecluster.rpc.router.failover import Patience, RequestFailover, is_loss

LOST = Unavailable("lost")
STALE = StaleRequest("other weights")
BUG = MoeClusterError("the model is broken")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(failover, "time", clock)
    return clock


def way(
    timeout_s: float = 60.0, patience_s: float = 8.0, *, max_failures: int = 1, awaits_lost: bool = True
) -> RequestFailover:
    return RequestFailover(
        Patience(
            request_timeout_s=timeout_s,
            router_wait_timeout_s=patience_s,
            max_failures=max_failures,
            awaits_lost=awaits_lost,
        )
    )


@pytest.mark.parametrize(
    "error",
    [InvalidMessage("", "wrong"), CheckpointError("wrong"), RequestFailed("it overflows"), ExpertsLost("no directory")],
)
def test_what_another_router_would_not_mend_is_raised_and_no_router_is_to_blame(error: MoeClusterError) -> None:
    request = way(max_failures=3)
    with pytest.raises(type(error)):
        request.failed(error)
    assert not is_loss(error)


def test_a_lost_router_is_to_blame_and_a_full_one_or_one_without_the_weights_is_not() -> None:
    assert [is_loss(error) for error in (LOST, BUG, BatchBroken("it broke"), DeadlineExceeded("late"))] == [True] * 4
    assert not is_loss(Exhausted("full")) and not is_loss(STALE)
    assert is_loss(STALE, pinned=False), "no weights were asked for"


def test_routers_may_be_lost_as_often_as_there_is_patience() -> None:
    request = way()
    for _ in range(20):
        request.failed(LOST)
    assert request.lost is LOST and not request.is_over()


@pytest.mark.parametrize("error", [BUG, DeadlineExceeded("no expert answered")])
def test_unexplained_errors_are_counted_from_token_to_token(error: MoeClusterError) -> None:
    request = way(max_failures=3)
    for _ in range(3):
        request.failed(error)
        request.failed(error)
        request.progressed()
    request.failed(error)
    request.failed(error)
    with pytest.raises(type(error)):
        request.failed(error)
    with pytest.raises(type(error)):
        way().failed(error)


def test_a_version_that_was_not_asked_for_makes_an_unexplained_error() -> None:
    request = way(max_failures=2)
    request.failed(STALE, pinned=False)
    assert request.stale is None
    with pytest.raises(StaleRequest):
        request.failed(STALE, pinned=False)


def test_broken_batches_are_counted_over_the_whole_request() -> None:
    request = way(max_failures=3)
    for _ in range(2):
        request.failed(BatchBroken("it broke"))
        request.progressed()
    with pytest.raises(BatchBroken):
        request.failed(BatchBroken("it broke"))


def test_of_full_routers_the_one_counts_that_has_room_first() -> None:
    request = way()
    for after_s in (5.0, 2.0, 9.0):
        request.failed(Exhausted("full", retry_after_s=after_s))
    assert request.full is not None and request.full.retry_after_s == 2.0
    request.begin_round()
    assert request.full is None


def test_patience_begins_anew_with_each_token_and_the_deadline_does_not(clock: Clock) -> None:
    request = way(timeout_s=10.0, patience_s=4.0)
    clock.now_s += 3.0
    assert not request.is_over() and request.is_over(wait_s=2.0)
    request.progressed()
    clock.now_s += 4.0
    assert not request.is_over() and request.left_s == 3.0
    clock.now_s += 4.0
    assert request.is_over() and request.left_s == 0.0


@pytest.mark.parametrize(
    ("others", "awaits_lost", "gives_up"),
    [
        ([], True, True),
        ([Exhausted("full")], True, False),
        ([LOST], True, False),
        ([LOST], False, True),
        ([LOST, Exhausted("full")], False, False),
    ],
    ids=["stale", "full", "lost", "lost-for-good", "lost-and-full"],
)
def test_weights_are_given_up_once_no_router_may_hold_them(
    others: list[MoeClusterError], awaits_lost: bool, gives_up: bool
) -> None:
    request = way(awaits_lost=awaits_lost)
    for error in others:
        request.failed(error)
    assert not request.gives_up_version(is_over=True), "no router is there without them"
    request.failed(STALE)
    assert request.gives_up_version(is_over=False) is gives_up
    assert request.gives_up_version(is_over=True)
    request.begin_round()
    assert not request.gives_up_version(is_over=True)
