"""Windows of a trace are the differences of the controller's counts, and nothing else."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moecluster.errors import ResourceError
from moecluster.simulation.trace.format import TraceEvent
from moecluster.simulation.trace.reader import open_trace
from moecluster.simulation.trace.recorder import TraceRecorder
from moecluster.simulation.trace.writer import TraceWriter
from moecluster.types import ActorPhase, ActorState, ClusterLoads
from tests.support.fakes.fake_controller import LOADS, NOW_S

WINDOW_S = 10.0


def loads(windows: float, routers: Mapping[str, tuple[int, ...]], **changes: Any) -> ClusterLoads:
    """The controller's counts after some windows; they are of layer 3."""
    tokens = {router: {3: counts} for router, counts in routers.items()}
    return dataclasses.replace(LOADS, time_s=NOW_S + windows * WINDOW_S, tokens=tokens, **changes)


def actors(first: str = "a1", second: str = "b1") -> tuple[ActorState, ...]:
    """The incarnations of expert-0 and expert-1; an actor without one is being restarted."""
    return tuple(
        ActorState(
            actor=name,
            address="127.0.0.1:5000",
            incarnation=incarnation,
            phase=ActorPhase.SERVING if incarnation else ActorPhase.RESTARTING,
            experts=3,
            restarts=0,
        )
        for name, incarnation in (("expert-0", first), ("expert-1", second))
    )


def recorder(routers: Mapping[str, tuple[int, ...]]) -> TraceRecorder:
    return TraceRecorder(loads(0, routers), actors(), WINDOW_S)


def test_a_window_is_what_came_to_it_over_all_routers() -> None:
    recording = recorder({"a": (100, 0, 0, 7), "b": (1, 1, 1, 1)})
    window = recording.take(loads(1, {"a": (103, 0, 0, 7), "b": (1, 2, 1, 1)}), actors())
    assert window is not None
    assert window.time_s == NOW_S + WINDOW_S and window.events == ()
    assert window.counts_LE.tolist() == [[0, 0, 0, 0], [3, 1, 0, 0]]


def test_a_router_that_was_restarted_counts_from_zero_and_a_new_one_from_where_it_is_first_seen() -> None:
    recording = recorder({"a": (100, 50, 0, 0)})
    window = recording.take(loads(1, {"a": (4, 60, 0, 0), "b": (900, 0, 0, 0)}), actors())
    assert window is not None and window.counts_LE[1].tolist() == [4, 60, 0, 0]
    window = recording.take(loads(2, {"a": (4, 61, 0, 0), "b": (902, 0, 0, 0)}), actors())
    assert window is not None and window.counts_LE[1].tolist() == [2, 1, 0, 0]


@pytest.mark.parametrize("windows", [0.4, 1.6, 0.0, -3.0])
def test_a_reading_out_of_time_ends_no_window_and_begins_the_next(windows: float) -> None:
    recording = recorder({"a": (0, 0, 0, 0)})
    assert recording.take(loads(windows, {"a": (5, 0, 0, 0)}), actors()) is None
    window = recording.take(loads(windows + 1, {"a": (7, 0, 0, 0)}), actors())
    assert window is not None and window.counts_LE[1].tolist() == [2, 0, 0, 0]


def test_deaths_and_returns_are_events() -> None:
    died, returned = (TraceEvent(kind=kind, actor="expert-1") for kind in ("actor_died", "actor_returned"))
    recording = recorder({"a": (0, 0, 0, 0)})
    seen = []
    for number, incarnation in enumerate(["b1", "", "", "b2", "b3"], start=1):
        window = recording.take(loads(number, {"a": (0, 0, 0, 0)}), actors(second=incarnation))
        assert window is not None
        seen.append(window.events)
    assert seen == [(), (died,), (), (returned,), (died, returned)]


def test_an_actor_that_is_away_from_the_start_is_dead_in_the_first_window() -> None:
    recording = TraceRecorder(loads(0, {}), actors(first=""), WINDOW_S)
    window = recording.take(loads(1, {}), actors(first=""))
    assert window is not None
    assert window.events[0] == TraceEvent(kind="actor_died", actor="expert-0")


def test_a_model_of_another_shape_ends_the_recording() -> None:
    recording = recorder({"a": (0, 0, 0, 0)})
    other = dataclasses.replace(loads(1, {}), layer_experts={0: 2}, expert_bytes={0: 1.0})
    with pytest.raises(ResourceError, match="another shape"):
        recording.take(other, actors())


def test_without_an_expert_actor_there_is_nothing_to_record() -> None:
    with pytest.raises(ResourceError, match="no expert actor"):
        TraceRecorder(loads(0, {}, actors=()), actors(), WINDOW_S)


def test_a_recording_is_read_as_it_was_written_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "loads.jsonl"
    for start in (0, 2):
        wavering = tuple(dataclasses.replace(actor, speed=1.0 + start / 100) for actor in LOADS.actors)
        first = loads(start, {"a": (10 * start, 0, 0, 0)}, actors=wavering)
        recording = TraceRecorder(first, actors(), WINDOW_S)
        with TraceWriter(path, recording.header) as trace:
            window = recording.take(loads(start + 1, {"a": (10 * start + 3, 0, 0, 1)}), actors())
            assert window is not None
            trace.add(window)
    read = open_trace(path)
    assert [layer.experts for layer in read.header.layers] == [2, 4]
    assert [actor.name for actor in read.header.actors] == ["expert-0", "expert-1"]
    assert [window.counts_LE[1].tolist() for window in read.windows()] == [[3, 0, 0, 1]] * 2


def test_a_controller_whose_clock_is_behind_continues_the_recording(tmp_path: Path) -> None:
    """It was started again on another host; and a later command goes on with the file."""
    path = tmp_path / "loads.jsonl"
    behind = -30.0  # windows
    for readings in ((0, 1, behind, behind + 1, behind + 2), (2 * behind, 2 * behind + 1)):
        recording = TraceRecorder(loads(readings[0], {"a": (0, 0, 0, 0)}), actors(), WINDOW_S)
        with TraceWriter(path, recording.header) as trace:
            for number, windows in enumerate(readings[1:], start=1):
                window = recording.take(loads(windows, {"a": (number, 0, 0, 0)}), actors())
                if window is not None:
                    trace.add(window)
    read = list(open_trace(path).windows())
    assert [window.counts_LE[1].tolist()[0] for window in read] == [1, 1, 1, 1]
    assert [window.time_s for window in read] == [NOW_S + number * WINDOW_S for number in (1, 2, 3, 4)]
