"""replay and simulate on the command line: the table, the plot, every figure, and one line for every user error."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moecluster.cli.app import app
from moecluster.cli.common.formatting import shown_part
from moecluster.errors import UserError
from moecluster.simulation.synthetic_load import LoadShape, SyntheticLoads
from moecluster.simulation.trace.format import TraceActor, TraceEvent, TraceHeader, TraceLayer, TraceWindow
from moecluster.simulation.trace.writer import TraceWriter

SMALL = ("--actors", "6", "--layers", "2", "--experts", "12", "--top-k", "2", "--hours", "0.5", "--slots", "3")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A trace of twelve windows of two layers x 8 experts on three actors, one of which dies and returns."""
    header = TraceHeader(
        model="tiny",
        window_s=10.0,
        layers=(TraceLayer(layer=0, experts=8, expert_bytes=1000), TraceLayer(layer=2, experts=8, expert_bytes=1000)),
        actors=tuple(TraceActor(name=f"expert-{i}", slots=5) for i in range(3)),
    )
    shape = LoadShape(num_layers=2, num_experts=8, top_k=2, tokens_per_s=2000.0)
    events = {
        5: TraceEvent(kind="actor_died", actor="expert-1"),
        7: TraceEvent(kind="actor_returned", actor="expert-1"),
    }
    path = tmp_path / "loads.jsonl"
    with TraceWriter(path, header) as writer:
        for number, load in enumerate(SyntheticLoads(shape, window_s=10.0, num_windows=12, seed=0)):
            happened = (events[number],) if number in events else ()
            writer.add(TraceWindow(time_s=load.time_s, counts_LE=load.counts_LE, events=happened))
    return path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def complaint(*arguments: str) -> str:
    """The one line of a user error."""
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_replay_shows_policies_side_by_side(trace, tmp_path) -> None:
    report, picture = tmp_path / "replay.json", tmp_path / "replay.png"
    said = run(
        "replay", str(trace), "--policy", "share", "--policy", "static", "--json", str(report), "--plot", str(picture)
    )
    assert re.search(r"share\s+┃\s+static", said)
    assert "tiny: 3 actors, 15 slots for each layer" in said
    figures = json.loads(report.read_text())
    assert [summary["policy"] for summary in figures["summaries"]] == ["share", "static"]
    assert figures["summaries"][0]["mean_balancedness"] >= figures["summaries"][1]["mean_balancedness"] > 0
    assert len(figures["windows"]["share"]) == 12
    assert figures["windows"]["static"][5]["lost_part"] > 0 == figures["windows"]["static"][6]["lost_part"]
    assert figures["budget_bytes"] == 5 * 2 * 1000
    assert picture.read_bytes().startswith(b"\x89PNG")


def write_counts(path: Path, *counts: int) -> Path:
    """Writes a trace of a layer of two experts on two actors, with the given tokens per expert and window."""
    header = TraceHeader(
        model="tiny",
        window_s=10.0,
        layers=(TraceLayer(layer=0, experts=2, expert_bytes=1000),),
        actors=tuple(TraceActor(name=f"expert-{i}", slots=1) for i in range(2)),
    )
    with TraceWriter(path, header) as writer:
        for number, count in enumerate(counts, start=1):
            writer.add(TraceWindow(time_s=10.0 * number, counts_LE=np.full((1, 2), count)))
    return path


@pytest.mark.parametrize("counts", [(0, 0, 0), (7, 0, 0)])
def test_a_trace_without_tokens_is_not_judged(tmp_path, counts) -> None:
    said = complaint("replay", str(write_counts(tmp_path / "silent.jsonl", *counts)))
    assert said.endswith("silent.jsonl: no window after the first has a token: there is nothing to judge")


def test_only_windows_with_tokens_are_judged(tmp_path) -> None:
    report, picture = tmp_path / "replay.json", tmp_path / "replay.png"
    path = write_counts(tmp_path / "mostly.jsonl", 7, 0, 5, 0)
    said = run("replay", str(path), "--json", str(report), "--plot", str(picture))
    assert re.search(r"windows, of them scored\s+│\s+3, 1 ", said) and "1.0000 (1.000)" in said
    of_windows = [window["balancedness"] for window in json.loads(report.read_text())["windows"]["share"]]
    assert of_windows == [1.0, None, 1.0, None]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("part", "digits", "shown"),
    [
        (0.0, 3, "0.000 %"),
        (1e-9, 3, "<0.001 %"),
        (0.5, 2, "50.00 %"),
        (1 - 1e-9, 4, ">99.9999 %"),
        (1.0, 4, "100.0000 %"),
    ],
)
def test_all_and_nothing_are_said_only_of_all_and_nothing(part, digits, shown) -> None:
    assert shown_part(part, digits) == shown


def test_replay_on_another_fleet(trace, tmp_path) -> None:
    report = tmp_path / "replay.json"
    said = run("replay", str(trace), "--actors", "4", "--slots", "4", "--budget-gb", "0.001", "--json", str(report))
    assert "4 actors, 16 slots" in said
    assert json.loads(report.read_text())["budget_bytes"] == 1e6


def test_simulate_shows_the_day_and_the_law_of_its_cost(tmp_path) -> None:
    report, picture = tmp_path / "day.json", tmp_path / "day.png"
    said = run("simulate", *SMALL, "--json", str(report), "--plot", str(picture))
    assert "share on 6 actors x 3 slots, 2 layers x 12 experts, 0.5 simulated hours" in said
    assert re.search(r"a decision grows as actors\^-?\d\.\d\d: ", said)
    figures = json.loads(report.read_text())
    assert len(figures["windows"]) == 30
    assert [size["actors"] for size in figures["sizes"]] == [4, 6, 8, 12]
    assert figures["summary"]["mean_balancedness"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_simulated_day_can_be_replayed(tmp_path) -> None:
    day = tmp_path / "day.jsonl"
    run("simulate", *SMALL, "--no-growth", "--trace", str(day))
    assert "6 actors, 18 slots for each layer" in run("replay", str(day))
    assert "is there already" in complaint("simulate", *SMALL, "--no-growth", "--trace", str(day))


def test_simulate_without_sizes_and_with_other_costs(tmp_path) -> None:
    report, picture = tmp_path / "day.json", tmp_path / "day.png"
    costs = ("--cost", "row_s=1e-6", "--cost", "link_bytes_per_s=5e10")
    said = run(
        "simulate", *SMALL, *costs, "--no-growth", "--policy", "static", "--json", str(report), "--plot", str(picture)
    )
    assert "grows as" not in said
    figures = json.loads(report.read_text())
    assert (figures["costs"]["row_s"], figures["costs"]["link_bytes_per_s"]) == (1e-6, 5e10)
    assert figures["sizes"] == []
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--policy", "sahre"), 'got "sahre"'),
        (("--slots", "2"), "6 slots"),
        (("--actors", "2", "--slots", "3"), "6 slots"),
        (("--slots", "0"), "--slots: got 0, expected at least 1"),
        (("--actors", "-2"), "--actors: got -2, expected at least 1"),
        (("--budget-gb", "0"), "budget: got 0 bytes, expected more than 0"),
        (("--budget-gb", "-1"), "budget: got -1e+09 bytes, expected more than 0"),
        (("--half-life-s", "0"), "--half-life-s: got 0, expected more than 0"),
        (("--plot", "x.docx"), '--plot: got "x.docx", expected a name that ends in .png'),
        (("--json", "nowhere/x.json"), '--json: got "nowhere/x.json", expected a file in a folder that is there'),
    ],
)
def test_replay_names_a_mistake(trace, arguments, expected) -> None:
    assert expected in complaint("replay", str(trace), *arguments)


def test_replay_names_a_wrong_trace(trace, tmp_path) -> None:
    assert "nowhere.jsonl: cannot be read" in complaint("replay", str(tmp_path / "nowhere.jsonl"))
    content = trace.read_bytes()
    trace.write_bytes(content[:-7])
    assert "loads.jsonl, line 13: is torn" in complaint("replay", str(trace))
    trace.write_bytes(content.replace(b'"experts":8', b'"experts":9', 1))
    assert "loads.jsonl, line 2: counts of layer 0: got 8 experts, expected 9" in complaint("replay", str(trace))
    trace.write_bytes(content.replace(b'"version":1', b'"version":7'))
    assert "line 1: version: got 7" in complaint("replay", str(trace))
    trace.write_bytes(b"\n".join(content.split(b"\n")[:2]) + b"\n")
    assert "one window, expected at least 2" in complaint("replay", str(trace))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--policy", "sahre"), 'got "sahre"'),
        (("--slots", "1"), "6 slots"),
        (("--budget-gb", "0"), "--budget-gb: got 0, expected more than 0"),
        (("--hours", "-1"), "--hours: got -1, expected more than 0"),
        (("--hours", "inf"), "--hours: got inf, expected an end"),
        (("--mtbf-hours", "0"), "--mtbf-hours: got 0, expected more than 0"),
        (("--utilization", "nan"), "--utilization: got nan, expected more than 0"),
        (("--top-k", "13"), "--top-k: got 13, expected at most the 12 experts"),
        (("--cost", "row=1"), '--cost: got "row=1", expected NAME=NUMBER'),
        (("--cost", "row_s=fast"), '--cost: got "row_s=fast", expected a number'),
        (("--cost", "row_s=-1"), "cost row_s: got -1, expected more than 0"),
        (("--costs", "nowhere.json"), "nowhere.json: cannot be read"),
    ],
)
def test_simulate_names_a_mistake(arguments, expected) -> None:
    assert expected in complaint("simulate", *SMALL, *arguments)
