"""Traces: they round-trip, a crash costs one line, and an error names the wrong line."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from moecluster.errors import TraceError
from moecluster.simulation.synthetic_load import LoadShape, SyntheticLoads
from moecluster.simulation.trace.format import TraceActor, TraceEvent, TraceHeader, TraceLayer, TraceWindow
from moecluster.simulation.trace.reader import open_trace
from moecluster.simulation.trace.writer import TraceWriter

HEADER = TraceHeader(
    model="tiny",
    window_s=2.0,
    layers=(TraceLayer(layer=1, experts=3, expert_bytes=100), TraceLayer(layer=4, experts=2, expert_bytes=50)),
    actors=(
        TraceActor(name="expert-0", slots=3, speed=2.0, node="n0"),
        TraceActor(name="expert-1", slots=2, node="n0"),
        TraceActor(name="expert-2", slots=2),
    ),
)
COUNTS = np.array([[5, 0, 7], [2, 1, 0]], dtype=np.int64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "loads.jsonl"
    with TraceWriter(path, HEADER) as writer:
        writer.add(TraceWindow(time_s=2.0, counts_LE=COUNTS))
        died = TraceEvent(kind="actor_died", actor="expert-1")
        writer.add(TraceWindow(time_s=4.0, counts_LE=2 * COUNTS, events=(died,)))
    return path


def read(path: Path) -> list[TraceWindow]:
    return list(open_trace(path).windows())


def test_what_is_written_is_read(path) -> None:
    trace = open_trace(path)
    assert trace.header == HEADER
    first, second = trace.windows()
    assert (first.time_s, first.events) == (2.0, ())
    np.testing.assert_array_equal(first.counts_LE, COUNTS)
    np.testing.assert_array_equal(second.counts_LE, 2 * COUNTS)
    assert second.events == (TraceEvent(kind="actor_died", actor="expert-1"),)


def test_the_fleet_of_a_trace() -> None:
    fleet = HEADER.fleet()
    assert fleet.slots_A.tolist() == [3, 2, 2]
    assert fleet.speed_A.tolist() == [2.0, 1.0, 1.0]
    assert fleet.node_A.tolist() == [0, 0, 1]
    assert fleet.expert_bytes_L.tolist() == [100.0, 50.0]


def test_every_cut_of_the_last_line_is_seen_and_mended_by_the_writer(path) -> None:
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(start + 1, len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(TraceError, match=r"loads\.jsonl, line 3: is torn"):
            read(path)
    with TraceWriter(path, HEADER) as writer:
        writer.add(TraceWindow(time_s=6.0, counts_LE=COUNTS))
    assert [window.time_s for window in read(path)] == [2.0, 6.0]


def test_a_trace_is_gone_on_with_in_the_order_of_time(path) -> None:
    with TraceWriter(path, HEADER) as writer:
        writer.add(TraceWindow(time_s=6.0, counts_LE=COUNTS))
        writer.add(TraceWindow(time_s=6.0, counts_LE=COUNTS))  # dated by another clock, as are those after it
        writer.add(TraceWindow(time_s=9.0, counts_LE=COUNTS))
    assert [window.time_s for window in read(path)] == [2.0, 4.0, 6.0, 8.0, 11.0]


def test_a_file_that_is_no_such_trace_is_left_alone(path, tmp_path) -> None:
    other = TraceHeader(model="other", window_s=2.0, layers=HEADER.layers, actors=HEADER.actors)
    before = path.read_bytes()
    with pytest.raises(TraceError, match="of another cluster or model"):
        TraceWriter(path, other)
    assert path.read_bytes() == before
    text = tmp_path / "notes.txt"
    for content in ("some notes", "some notes\n"):
        text.write_text(content)
        with pytest.raises(TraceError, match=r"notes\.txt, line 1: "):
            TraceWriter(text, HEADER)
        assert text.read_text() == content
    with pytest.raises(TraceError, match="cannot be written"):
        TraceWriter(tmp_path, HEADER)


def changed(path: Path, number: int, **fields: object) -> None:
    """Replaces fields of a line; a value of ... removes the field."""
    lines = path.read_text().splitlines()
    line = json.loads(lines[number - 1]) | fields
    lines[number - 1] = json.dumps({key: value for key, value in line.items() if value is not ...})
    path.write_text("\n".join(lines) + "\n")


LAYERS = [{"layer": 1, "experts": 3, "expert_bytes": 100}, {"layer": 4, "experts": 2, "expert_bytes": 50}]
ACTOR = {"name": "expert-0", "slots": 3, "speed": 2.0, "node": "n0"}


@pytest.mark.parametrize(
    ("number", "fields", "expected"),
    [
        (1, {"format": "other"}, 'line 1: is not the first line of a trace: "format" is not "moecluster-trace"'),
        (1, {"version": 2}, "line 1: version: got 2, and this moecluster reads version 1"),
        (1, {"window_s": 0}, "line 1: window_s: got 0, expected more than 0"),
        (1, {"window_s": float("nan")}, "line 1: got NaN, expected only finite numbers"),
        (1, {"model": ...}, "line 1: the first line: model is missing"),
        (1, {"colour": 1}, "line 1: the first line: unknown field colour"),
        (1, {"layers": []}, "line 1: there are no layers or no actors"),
        (1, {"layers": LAYERS[::-1]}, "line 1: layers: layer 1 after 4, expected ascending ones"),
        (1, {"layers": [{**LAYERS[0], "experts": 0}]}, "line 1: layers.experts: got 0, expected a whole number of at"),
        (1, {"actors": [ACTOR, ACTOR]}, "line 1: actors: expert-0 is named twice"),
        (1, {"actors": [{**ACTOR, "speed": -1.0}]}, "line 1: actors.speed: got -1.0, expected more than 0"),
        (1, {"actors": [{**ACTOR, "slots": -1}]}, "line 1: actors.slots: got -1, expected a whole number of at least"),
        (1, {"actors": {"a": 1}}, 'line 1: actors: got {"a": 1}, expected a list'),
        (3, {"time_s": 2.0}, "line 3: time_s: got 2 after 2, expected windows in the order of time"),
        (3, {"time_s": "noon"}, 'line 3: time_s: got "noon", expected a number'),
        (3, {"time_s": float("inf")}, "line 3: got Infinity, expected only finite numbers"),
        (3, {"counts": [[1, 2, 3]]}, "line 3: counts: got 1 layers, expected 2 as in the first line"),
        (3, {"counts": [[1, 2], [1, 2]]}, "line 3: counts of layer 1: got 2 experts, expected 3"),
        (3, {"counts": [[1, 2, -3], [1, 2]]}, "line 3: counts of layer 1: got -3, expected a whole number of at least"),
        (3, {"counts": [[1, 2, 3.5], [1, 2]]}, "line 3: counts of layer 1: got 3.5, expected a whole number"),
        (3, {"counts": [[1, 2, True], [1, 2]]}, "line 3: counts of layer 1: got true, expected a whole number"),
        (3, {"counts": [[1, 2, None], [1, 2]]}, "line 3: counts of layer 1: got null, expected a whole number"),
        (3, {"counts": [[1, 2, 10**30], [1, 2]]}, "line 3: counts of layer 1: got 1000000000"),
        (3, {"events": [{"kind": "party", "actor": "expert-0"}]}, 'line 3: events.kind: got "party", expected actor_d'),
        (3, {"events": [{"kind": "actor_died", "actor": "x"}]}, 'line 3: events.actor: got "x", which is no actor'),
    ],
)
def test_a_wrong_field_names_itself(path, number, fields, expected) -> None:
    changed(path, number, **fields)
    with pytest.raises(TraceError) as caught:
        read(path)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "line 1: is empty"),
        (b"\x00\x01\xff\xfe\n", "line 1: is no JSON"),
        (b"[1, 2]\n", "line 1: the line: got [1, 2], expected an object"),
        (b"[" * 100_000 + b"\n", "line 1: is no JSON"),
        (b'{"format": "moecluster-trace", "ver', "line 1: is torn"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path, content, expected) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(TraceError) as caught:
        read(tmp_path / "x")
    assert expected in str(caught.value)


def test_a_trace_that_is_not_there_or_has_no_window(tmp_path) -> None:
    with pytest.raises(TraceError, match="nowhere: cannot be read: No such file"):
        open_trace(tmp_path / "nowhere")
    TraceWriter(tmp_path / "short", HEADER).close()
    with pytest.raises(TraceError, match="line 2: there is no window"):
        read(tmp_path / "short")


def test_synthetic_loads_are_the_same_for_a_seed_and_have_the_shape_asked_for() -> None:
    shape = LoadShape(num_layers=3, num_experts=16, top_k=4, tokens_per_s=1e5, swing=0.5)
    first, again = (list(SyntheticLoads(shape, window_s=600.0, num_windows=144, seed=5)) for _ in range(2))
    other = next(iter(SyntheticLoads(shape, window_s=600.0, num_windows=1, seed=6)))
    for left, right in zip(first, again, strict=True):
        np.testing.assert_array_equal(left.counts_LE, right.counts_LE)
    assert (other.counts_LE != first[0].counts_LE).any()
    rates = np.array([load.tokens_per_s for load in first])
    assert rates.max() / rates.min() == pytest.approx(3.0, rel=0.05)  # (1 + 0.5) / (1 - 0.5) over the day
    for load in first:
        np.testing.assert_allclose(load.popularity_LE.sum(axis=1), 1.0)
        expected = load.tokens_per_s * 600.0 * 4
        np.testing.assert_allclose(load.counts_LE.sum(axis=1), expected, rtol=0.01)


def test_synthetic_loads_drift_and_burst_but_keep_their_skew() -> None:
    shape = LoadShape(num_layers=8, num_experts=64, top_k=4, tokens_per_s=1e6, bursts_per_hour=6.0)
    loads = list(SyntheticLoads(shape, window_s=60.0, num_windows=600, seed=1))
    step = [np.abs(b.popularity_LE - a.popularity_LE).sum() / 2 / 8 for a, b in itertools.pairwise(loads)]
    assert 0.005 < np.median(step) < 0.1  # part of a layer's load that moves between experts from window to window
    assert max(step) > 1.5 * np.median(step)  # a burst begins
    far = np.abs(loads[-1].popularity_LE - loads[0].popularity_LE).sum() / 2 / 8
    assert far > 3 * np.median(step)
    top = [np.sort(load.popularity_LE, axis=1)[:, -6:].sum(axis=1).mean() for load in loads]
    assert min(top) > 0.3 and max(top) < 0.9
