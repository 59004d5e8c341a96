import queue

import numpy as np
import pytest

from moecluster.dispatch.load_counts import LoadCounts, LoadReporter, difference
from moecluster.placement.names import layer_balancedness
from moecluster.types import ActorAddress, ExpertId, LoadSnapshot, Placement, Replica


def expert(layer: int, index: int) -> ExpertId:
    return ExpertId(layer=layer, index=index)


def placement(*replicas: Replica) -> Placement:
    names = ("a", "b")
    actors = {name: ActorAddress(actor=name, address="h:1", incarnation=name) for name in names}
    return Placement(term=1, generation=1, layer_experts={0: 2, 1: 2}, actors=actors, replicas=replicas)


def test_balancedness_is_mean_over_max_of_the_actors_loads() -> None:
    current = placement(
        Replica(expert=expert(0, 0), actor="a"),
        Replica(expert=expert(0, 1), actor="b"),
        Replica(expert=expert(1, 0), actor="a"),
        Replica(expert=expert(1, 1), actor="a"),
    )
    found = layer_balancedness(current, {expert(0, 0): 30, expert(0, 1): 10, expert(1, 0): 4})
    assert found == {0: pytest.approx(20 / 30), 1: pytest.approx(0.5)}


def test_shares_split_a_load_and_silent_layers_are_left_out() -> None:
    current = placement(
        Replica(expert=expert(0, 0), actor="a", share=0.75),
        Replica(expert=expert(0, 0), actor="b", share=0.25),
        Replica(expert=expert(0, 1), actor="b"),
        Replica(expert=expert(1, 0), actor="a"),
    )
    assert layer_balancedness(current, {expert(0, 0): 40, expert(0, 1): 20}) == {0: pytest.approx(1.0)}


def test_only_what_was_gained_counts() -> None:
    before = {0: np.array([3, 1, 0])}
    now = {0: np.array([3, 4, 2]), 1: np.array([0, 7, 0])}
    assert difference(now, before) == {expert(0, 1): 3, expert(0, 2): 2, expert(1, 1): 7}


def test_a_window_is_reported_once_and_silence_not_at_all() -> None:
    loads = LoadCounts()
    reports: queue.SimpleQueue[LoadSnapshot] = queue.SimpleQueue()
    loads.add(0, np.array([5, 5]))  # before the reporter began
    reporter = LoadReporter(loads, reports.put, window_s=0.02)
    loads.add(0, np.array([1, 0]))
    report = reports.get(timeout=10)
    assert report.tokens == {expert(0, 0): 1}
    with pytest.raises(queue.Empty):
        reports.get(timeout=0.2)
    reporter.close()
