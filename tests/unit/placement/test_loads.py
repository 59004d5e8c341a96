"""Load windows do not depend on when the counters were read, or on which router counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecluster.errors import InvalidMessage
from moecluster.placement.load.window import (
    CounterReading,
    ExponentialWindow,
    LoadWindow,
    SlidingWindow,
    make_load_window,
)

EXPERTS = {2: 3, 5: 2}


def reading(now_s: float, **routers: tuple[list[int], list[int]]) -> CounterReading:
    tokens = {
        router: {2: np.array(first, dtype=np.int64), 5: np.array(second, dtype=np.int64)}
        for router, (first, second) in routers.items()
    }
    return CounterReading(now_s=now_s, tokens=tokens)


def windows() -> list[LoadWindow]:
    return [SlidingWindow(EXPERTS, window_s=10.0), ExponentialWindow(EXPERTS, half_life_s=5.0)]


@pytest.mark.parametrize("window", windows())
def test_a_steady_rate_is_told_exactly_from_the_second_reading_on(window) -> None:
    assert (window.load_LE == 0).all()
    for second in range(30):
        window.add(reading(100.0 + second, a=([4 * second, 0, second], [2 * second, 0])))
        if second:
            np.testing.assert_allclose(window.load_LE, [[4, 0, 1], [2, 0, 0]], rtol=1e-12)


@pytest.mark.parametrize("window", windows())
def test_what_routers_counted_before_the_first_reading_is_no_load(window) -> None:
    window.add(reading(0.0, a=([10**9, 0, 0], [0, 0])))
    window.add(reading(1.0, a=([10**9 + 3, 0, 0], [0, 0]), late=([0, 10**9, 0], [0, 0])))
    np.testing.assert_allclose(window.load_LE, [[3, 0, 0], [0, 0, 0]])
    window.add(reading(2.0, a=([10**9 + 3, 0, 0], [0, 0]), late=([0, 10**9 + 1, 0], [0, 0])))
    assert 0 < window.load_LE[0, 1] <= 1


@pytest.mark.parametrize("window", windows())
def test_a_restarted_router_counts_from_zero(window) -> None:
    window.add(reading(0.0, a=([500, 500, 0], [0, 0])))
    window.add(reading(1.0, a=([7, 600, 0], [0, 0])))  # one counter decreased: the process restarted
    np.testing.assert_allclose(window.load_LE, [[7, 600, 0], [0, 0, 0]])


def test_a_router_that_vanished_adds_nothing_and_may_come_back() -> None:
    window = SlidingWindow(EXPERTS, window_s=10.0)
    window.add(reading(0.0, a=([0, 0, 0], [0, 0]), b=([0, 0, 0], [0, 0])))
    window.add(reading(1.0, a=([1, 0, 0], [0, 0]), b=([0, 5, 0], [0, 0])))
    for second in range(2, 5):
        window.add(reading(float(second), a=([second, 0, 0], [0, 0])))
    assert window.tokens_LE[0].tolist() == [4, 5, 0]
    window.add(reading(5.0, a=([5, 0, 0], [0, 0]), b=([0, 9, 0], [0, 0])))
    assert window.tokens_LE[0].tolist() == [5, 9, 0]
    window.add(reading(30.0, a=([6, 0, 0], [0, 0])))
    window.add(reading(31.0, a=([6, 0, 0], [0, 0]), b=([0, 999, 0], [0, 0])))  # absent for longer than the window
    assert window.tokens_LE[0, 1] == 0


def test_seconds_since_the_last_token() -> None:
    window = ExponentialWindow(EXPERTS, half_life_s=5.0)
    window.add(reading(10.0, a=([0, 5, 0], [0, 0])))
    window.add(reading(12.0, a=([1, 5, 0], [0, 0])))
    window.add(reading(20.0, a=([1, 5, 0], [0, 3])))
    assert window.idle_s_LE.tolist() == [[8, 10, 10], [10, 0, 10]]


def test_the_exponential_window_forgets_by_half() -> None:
    window = ExponentialWindow(EXPERTS, half_life_s=5.0)
    window.add(reading(0.0, a=([0, 0, 0], [0, 0])))
    window.add(reading(1000.0, a=([8000, 0, 0], [0, 0])))
    window.add(reading(1005.0, a=([8000, 0, 0], [0, 0])))
    assert window.load_LE[0, 0] == pytest.approx(4.0)


def test_a_reading_of_another_model_is_refused_and_changes_nothing() -> None:
    window = SlidingWindow(EXPERTS, window_s=10.0)
    window.add(reading(0.0, a=([0, 0, 0], [0, 0])))
    for layer, counts in ((3, [1, 2]), (2, [1, 2]), (5, [1, -2])):
        with pytest.raises(InvalidMessage, match="tokens: bad counts"):
            window.add(CounterReading(now_s=1.0, tokens={"bad": {layer: np.array(counts, dtype=np.int64)}}))
    window.add(reading(1.0, a=([2, 0, 0], [0, 0])))
    assert window.load_LE[0, 0] == 2


def test_a_reading_that_is_not_newer_is_left_out() -> None:
    window = SlidingWindow(EXPERTS, window_s=10.0)
    window.add(reading(5.0, a=([0, 0, 0], [0, 0])))
    window.add(reading(6.0, a=([4, 0, 0], [0, 0])))
    window.add(reading(6.0, a=([9, 0, 0], [0, 0])))
    window.add(reading(7.0, a=([9, 0, 0], [0, 0])))
    assert window.tokens_LE[0, 0] == 9


def test_windows_by_name() -> None:
    assert isinstance(make_load_window("sliding", EXPERTS, 30.0), SlidingWindow)
    assert isinstance(make_load_window("exponential", EXPERTS, 30.0), ExponentialWindow)


@given(
    gains=st.lists(st.lists(st.integers(0, 1000), min_size=5, max_size=5), min_size=1, max_size=12),
    looked=st.data(),
)
def test_any_split_into_readings_and_routers_gives_the_same_totals(gains, looked) -> None:
    """Gains per second; one window reads every second, one rarely, one reads counters split over two routers."""
    totals = np.vstack([np.zeros(5, dtype=np.int64), np.cumsum(gains, axis=0)])
    last = len(gains)
    edge = looked.draw(st.integers(0, last - 1), label="where the window begins")
    some = looked.draw(st.sets(st.integers(0, last)), label="further looks")
    every, rare, split = (SlidingWindow(EXPERTS, window_s=float(last - edge)) for _ in range(3))
    for second in range(last + 1):
        counts = totals[second]
        if second in some | {0, edge, last}:
            rare.add(reading(float(second), a=(counts[:3].tolist(), counts[3:].tolist())))
        every.add(reading(float(second), a=(counts[:3].tolist(), counts[3:].tolist())))
        half = counts // 2
        rest = counts - half
        split.add(
            reading(float(second), a=(half[:3].tolist(), half[3:].tolist()), b=(rest[:3].tolist(), rest[3:].tolist()))
        )
    expected = totals[last] - totals[edge]
    for window in (every, rare, split):
        np.testing.assert_allclose(window.tokens_LE[0], expected[:3], atol=1e-9)
        np.testing.assert_allclose(window.tokens_LE[1, :2], expected[3:], atol=1e-9)
        assert (window.idle_s_LE >= 0).all()


@given(
    steps=st.lists(
        st.tuples(st.floats(0.01, 5.0), st.integers(0, 100), st.sampled_from(["counts", "restarts", "is away"])),
        min_size=2,
        max_size=40,
    )
)
def test_no_restart_or_absence_makes_a_load_that_was_not_there(steps) -> None:
    windows = [SlidingWindow(EXPERTS, window_s=4.0), ExponentialWindow(EXPERTS, half_life_s=2.0)]
    now_s, counter, real, shortest_s = 0.0, 10**6, 0, 5.0
    for window in windows:
        window.add(reading(now_s, a=([counter, 0, 0], [0, 0])))
    for gap_s, gained, what in steps:
        now_s += gap_s
        shortest_s = min(shortest_s, gap_s)
        counter = gained if what == "restarts" else counter + gained
        real += gained
        for window in windows:
            routers = {} if what == "is away" else {"a": ([counter, 0, 0], [0, 0])}
            window.add(reading(now_s, **routers))
            assert (window.load_LE >= 0).all() and (window.load_LE[0, 1:] == 0).all()
            assert window.load_LE[0, 0] <= real / shortest_s * (1 + 1e-9)
    sliding = windows[0]
    assert isinstance(sliding, SlidingWindow)
    assert sliding.tokens_LE[0, 0] <= real * (1 + 1e-9)
