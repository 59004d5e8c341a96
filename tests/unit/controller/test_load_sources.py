import threading

import numpy as np
import pytest

from moecluster.controller.load.direct import MAX_ASSIGNMENTS, DirectLoadSource
from moecluster.errors import InvalidMessage
from moecluster.placement.load.window import SlidingWindow
from moecluster.types import ActorWork, ExpertId, LoadSnapshot

LAYER_EXPERTS = {1: 3, 4: 2}


class Clock:
    """A clock set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def report(**tokens: int) -> LoadSnapshot:
    """From l1e0=5: layer 1, expert 0, 5 assignments."""
    experts = {ExpertId(layer=int(name[1]), index=int(name[3])): count for name, count in tokens.items()}
    return LoadSnapshot(tokens=experts)


def counted(source: DirectLoadSource) -> dict[str, dict[int, list[int]]]:
    tokens = source.read(0.0).counters.tokens
    return {router: {layer: t.tolist() for layer, t in layers.items()} for router, layers in tokens.items()}


def test_reports_add_up_router_by_router() -> None:
    source = DirectLoadSource(LAYER_EXPERTS)
    source.add("a", report(l1e0=5, l1e2=1))
    source.add("b", report(l1e0=7))
    source.add("a", report(l1e0=2, l4e1=9))
    assert counted(source) == {"a": {1: [7, 0, 1], 4: [0, 9]}, "b": {1: [7, 0, 0]}}


def test_a_reading_stays_as_it_was_and_is_dated_by_the_caller() -> None:
    source = DirectLoadSource(LAYER_EXPERTS)
    source.add("a", report(l1e0=5))
    reading = source.read(17.5)
    source.add("a", report(l1e0=5))
    assert reading.counters.now_s == 17.5
    assert reading.counters.tokens["a"][1].tolist() == [5, 0, 0]
    assert reading.counters.tokens["a"][1].dtype == np.int64


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (report(l1e0=1, l1e3=1), "1/3"),
        (report(l1e0=1, l2e0=1), "2/0"),
        (report(l1e0=1, l4e0=-1), "loads.assignments"),
        (report(l1e0=1, l4e0=MAX_ASSIGNMENTS + 1), "loads.assignments"),
    ],
)
def test_a_report_of_what_is_not_there_is_refused_whole(bad: LoadSnapshot, field: str) -> None:
    source = DirectLoadSource(LAYER_EXPERTS)
    source.add("a", report(l1e0=5))
    with pytest.raises(InvalidMessage, match=field):
        source.add("a", bad)
    with pytest.raises(InvalidMessage):
        source.add("new", bad)
    assert counted(source) == {"a": {1: [5, 0, 0]}}


def test_routers_and_actors_that_fell_silent_are_forgotten() -> None:
    clock = Clock()
    source = DirectLoadSource(LAYER_EXPERTS, forget_after_s=10.0, clock=clock)
    source.add("silent", report(l1e0=5))
    source.set_work("gone", ActorWork(computed_rows=1))
    clock.now_s += 8.0
    source.add("talking", report(l1e0=5))
    source.set_work("here", ActorWork(computed_rows=1))
    assert counted(source).keys() == {"silent", "talking"}
    clock.now_s += 8.0
    reading = source.read(0.0)
    assert reading.counters.tokens.keys() == {"talking"} and reading.work.keys() == {"here"}


def test_of_too_many_routers_the_one_that_was_silent_for_longest_is_forgotten() -> None:
    clock = Clock()
    source = DirectLoadSource(LAYER_EXPERTS, max_routers=2, clock=clock)
    for router in ("a", "b", "a", "c"):
        clock.now_s += 1.0
        source.add(router, report(l1e0=1))
    assert counted(source) == {"a": {1: [2, 0, 0]}, "c": {1: [1, 0, 0]}}


def test_the_work_of_an_actor_is_what_its_newest_incarnation_has_done() -> None:
    source = DirectLoadSource(LAYER_EXPERTS)
    source.set_work("expert-0", ActorWork(computed_rows=90, busy_s=3.0))
    second = ActorWork(computed_rows=10, expert_runs=4, busy_s=0.5)
    source.set_work("expert-0", second)
    assert source.read(0.0).work == {"expert-0": second}


def test_reports_from_many_threads_lose_nothing() -> None:
    source = DirectLoadSource(LAYER_EXPERTS)

    def send(router: str) -> None:
        for _ in range(500):
            source.add(router, report(l1e1=2, l4e0=1))
            source.read(0.0)

    threads = [threading.Thread(target=send, args=(f"router-{i % 2}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted(source) == {f"router-{i}": {1: [0, 2000, 0], 4: [1000, 0]} for i in range(2)}


def test_a_window_over_its_readings_has_the_rate_of_the_reports() -> None:
    source = DirectLoadSource(LAYER_EXPERTS)
    window = SlidingWindow(LAYER_EXPERTS, window_s=100.0)
    for second in range(11):
        source.add("a", report(l1e0=30, l4e1=10))
        window.add(source.read(float(second)).counters)
    np.testing.assert_allclose(window.load_LE, [[30, 0, 0], [0, 10, 0]])
