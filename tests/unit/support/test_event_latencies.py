import pytest

from tests.support.soak.cluster_events import ClusterEvent
from tests.support.soak.event_latencies import UNDISTURBED, event_latencies

TEXTS = [[0.0, 0.1, 0.2, 0.3, 5.3, 5.4], [10.0, 10.1, 12.1]]


def event(kind: str, begun_s: float, ended_s: float) -> ClusterEvent:
    return ClusterEvent(kind=kind, what="", begun_s=begun_s, ended_s=ended_s)


def test_a_wait_counts_for_what_it_met_and_only_once_for_a_kind() -> None:
    happened = [event("kill", 1.0, 2.0), event("kill", 4.0, 5.0), event("move", 11.0, 20.0)]
    rows = {row.kind: row for row in event_latencies(TEXTS, happened)}
    assert [*rows] == [UNDISTURBED, "kill", "move"]
    assert {kind: (row.events, row.tokens) for kind, row in rows.items()} == {
        UNDISTURBED: (0, 5),
        "kill": (2, 1),
        "move": (1, 1),
    }
    assert rows["kill"].max_s == pytest.approx(5.0)
    assert rows["move"].p99_s == pytest.approx(2.0)
    assert rows[UNDISTURBED].p50_s == pytest.approx(0.1)


def test_a_wait_within_two_kinds_counts_for_both() -> None:
    rows = {row.kind: row for row in event_latencies(TEXTS, [event("kill", 1.0, 2.0), event("move", 0.05, 6.0)])}
    assert rows["kill"].max_s == rows["move"].max_s == pytest.approx(5.0)
    assert rows["move"].tokens == 5


def test_an_event_that_no_wait_met_has_no_row() -> None:
    assert [row.kind for row in event_latencies(TEXTS, [event("drain", 7.0, 8.0)])] == [UNDISTURBED]
