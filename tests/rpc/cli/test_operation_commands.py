"""Output and failures of the commands that call a controller, against a test controller over loopback."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors import cluster_file
from actors.cluster_file import UpCluster
from moecluster.cli.app import main
from moecluster.cli.commands import operations as operation_commands
from moecluster.rpc.controller.server import serve_controller
from moecluster.rpc.server import RunningServer
from moecluster.simulation.trace.reader import open_trace
from moecluster.types import OperationKind, OperationPhase, Replica
from tests.support.fakes.fake_controller import LOADS, NOW_S, OLD_OPERATION, PLACEMENT, PLAN, FakeController
from tests.support.waiting import WAIT_S, wait_until

NOBODY = "127.0.0.1:1"
ROOT = Path(__file__).resolve().parents[3]

Run = Callable[..., SimpleNamespace]


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(operation_commands, "POLL_S", 0.01)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def controller() -> FakeController:
    scripted = FakeController()
    scripted.publish(PLACEMENT)
    return scripted


@pytest.fixture
def server(controller: FakeController) -> Iterator[RunningServer]:
    running = serve_controller(controller, credentials=None)
    note_cluster(running.address)
    yield running
    controller.close()
    running.stop(0.0)


def note_cluster(controller_address: str) -> None:
    """As `up` does, on a Ray that this test does not own."""
    cluster_file.save(
        UpCluster(
            name="moecluster",
            ray_address=NOBODY,
            model="/models/tiny",
            router_addresses=(NOBODY,),
            controller_address=controller_address,
            local_ray=None,
        )
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line; returns its exit code and output."""

    def run_command(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["moecluster", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert "Traceback" not in output.err + output.out
        return SimpleNamespace(code=ended.value.code, out=output.out, err=output.err)

    return run_command


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (("scale", "3"), ("3",)),
        (("drain", "expert-1"), ("expert-1",)),
        (("drain", "node-a"), ("node-a",)),
        (("place", "3/1", "expert-1", "expert-0"), ("3/1", "expert-1", "expert-0")),
        (("place", "0/0", "--nowhere"), ("0/0",)),
    ],
)
def test_an_order_is_waited_for_and_ends_in_one_line(run, controller, command, arguments) -> None:
    done = run(*command)
    assert done.code == 0
    begun = controller.operations(1)[0]
    assert (begun.kind, begun.arguments, begun.phase) == (command[0], arguments, OperationPhase.DONE)
    assert done.out == f"{begun.id} is done after 1.0 s: no replica moved\n" and done.err == ""


@pytest.mark.usefixtures("server")
def test_the_same_id_asks_for_nothing_new(run, controller) -> None:
    begun = run("scale", "3", "--id", "evening", "--no-wait")
    assert begun.out == "evening is queued; moecluster explain evening says how it goes\n"
    assert run("scale", "3", "--id", "evening").out.startswith("evening is done")
    assert run("scale", "3", "--id", "evening").code == 0
    assert [o.id for o in controller.operations(0)] == ["evening", OLD_OPERATION.id]
    other = run("scale", "4", "--id", "evening")
    assert other.code == 2 and "evening asked for something else" in other.err


@pytest.mark.usefixtures("server")
def test_routers_are_ordered_by_the_same_command(run, controller) -> None:
    done = run("scale", "--routers", "2")
    begun = controller.operations(1)[0]
    assert (begun.kind, begun.arguments) == (OperationKind.SCALE_ROUTERS, ("2",))
    assert done.code == 0 and done.out == f"{begun.id} is done after 1.0 s: routers: 2\n"
    assert run("scale", "--routers", "9").err.startswith("moecluster: 9 routers: at most 4")


def test_an_operation_that_fails_is_exit_code_1_with_the_reason(run) -> None:
    controller = FakeController(fails="no node has a free CPU")
    controller.publish(PLACEMENT)
    running = serve_controller(controller, credentials=None)
    note_cluster(running.address)
    failed = run("scale", "3", "--id", "evening")
    assert failed.code == 1
    assert failed.err == "moecluster: OperationFailed: evening: no node has a free CPU\n"
    assert "no node has a free CPU" in run("explain", "evening").out
    controller.close()
    running.stop(0.0)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("scale", "0"), "N: got 0, expected at least 1 expert actor"),
        (("scale", "9"), "9 expert actors: at most 8 (cluster.max_expert_actors)"),
        (("scale", "3", "--id", "a\nb"), "operation_id: 'a\\nb', expected 1 to 256 printable characters"),
        (("drain", "moon"), "moon is neither a node nor an expert actor; there are node-a, expert-0, expert-1"),
        (("drain", ""), "node: '', expected 1 to 256 printable characters"),
        (("place", "3/1", "expert-7"), "expert-7 is no expert actor; there are expert-0, expert-1"),
        (("place", "9/0", "expert-0"), "9/0: the model has no such expert"),
        (("place", "3", "expert-0"), 'EXPERT: got "3", expected layer/index such as 3/17'),
        (("place", "3/x", "expert-0"), 'EXPERT: got "3/x", expected layer/index such as 3/17'),
        (("place", "3/99999999999", "expert-0"), 'EXPERT: got "3/99999999999", expected'),
        (("place", "3/1"), "ACTOR: expected the names of one actor or more, or --nowhere"),
        (("place", "3/1", "expert-0", "--nowhere"), "ACTOR: expected the names of one actor or more, or --nowhere"),
        (("place", "3/1", "expert-0", "expert-0"), "actors: expert-0 is named twice"),
        (("plan", "--policy", "best"), 'policy "best" is not known; there are share, eplb'),
        (("explain", "never"), "operation never is not known; moecluster operations lists those that are"),
        (("record", "out.jsonl", "--window-s", "0"), "--window-s: got 0, expected more than 0 seconds"),
        (("record", "out.jsonl", "--window-s", "nan"), "--window-s: got nan, expected more than 0 seconds"),
        (("record", "out.jsonl", "--for-s", "1"), "--for-s: got 1, expected at least --window-s (10)"),
        (("record", "nowhere/out.jsonl"), 'OUT: got "nowhere/out.jsonl", expected a file in a folder that is there'),
        (("status", "--name", "second"), "no cluster second is up"),
        (("scale", "3", "--name", "second"), "no cluster second is up"),
    ],
)
def test_bad_input_is_one_line_and_nothing_begins(run, controller, arguments, line) -> None:
    refused = run(*arguments)
    assert refused.code == (3 if "no cluster" in line else 2), refused
    assert refused.err.startswith(f"moecluster: {line}") and refused.err.count("\n") == 1
    assert controller.operations(0) == (OLD_OPERATION,)


@pytest.mark.usefixtures("server")
def test_a_plan_shows_what_would_move_what_it_gains_and_costs(run, controller) -> None:
    shown = run("plan").out
    assert "share: expert 3/1 is hot" in shown
    assert "balancedness 0.600 now, 0.950 predicted (+0.350)" in shown
    assert "replicas: 1 to add, 1 to remove; shares: 1 to change; 2.0 kB to load" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["add", "3/1", "expert-0", "0.500"] in rows and ["remove", "3/2", "expert-0"] in rows
    assert "nothing was done" in shown
    planned = json.loads(run("plan", "--policy", "eplb", "--json").out)
    assert planned["policy"] == "eplb" and planned["added"][0]["expert"] == {"layer": 3, "index": 1}
    assert controller.planned == ["", "eplb"] and controller.operations(0) == (OLD_OPERATION,)


@pytest.mark.usefixtures("server")
def test_a_long_plan_is_cut_in_the_table_and_whole_in_json(run, controller) -> None:
    added = tuple(
        Replica(expert=dataclasses.replace(PLAN.added[0].expert, index=index), actor="expert-0", share=1.0)
        for index in range(100)
    )
    controller.plan = lambda policy: dataclasses.replace(PLAN, added=added)
    assert "and 61 more, which --json shows" in run("plan").out
    assert len(json.loads(run("plan", "--json").out)["added"]) == 100


@pytest.mark.usefixtures("server")
def test_operations_are_listed_and_explained(run) -> None:
    run("scale", "3", "--id", "evening")
    rows = run("operations").out.splitlines()
    assert [row.split()[0] for row in rows] == ["operation", "evening", OLD_OPERATION.id]
    assert "done" in rows[2] and "2.5 s" in rows[2] and "4.1 kB" in rows[2] and "expert 3/1 is hot" in rows[2]
    assert len(run("operations", "--limit", "1").out.splitlines()) == 2
    assert [o["phase"] for o in json.loads(run("operations", "--json").out)] == ["done", "done"]
    explained = run("explain", OLD_OPERATION.id).out
    assert "0.600 before, 0.950 predicted, 0.930 measured, gain +0.330 of +0.350 predicted" in explained
    assert "replicas: 2 added, 1 removed; 4.1 kB loaded" in explained and "2.5 s" in explained
    plain = json.loads(run("explain", OLD_OPERATION.id, "--json").out)
    assert plain["balancedness_measured"] == 0.93 and plain["ended_s"] == NOW_S + 2.5


def test_without_a_controller_ray_is_asked_and_says_what_is_wrong(run) -> None:
    note_cluster(NOBODY)
    refused = run("operations")
    assert refused.code == 3
    assert f"no controller answers at {NOBODY}; asking Ray where it is now" in refused.err
    assert f"moecluster: no Ray cluster answers at {NOBODY}" in refused.err


class Counting(threading.Thread):
    """Advances a controller's counters and clock as if tokens arrived."""

    def __init__(self, controller: FakeController) -> None:
        super().__init__(daemon=True)
        self._controller = controller
        self._ended = threading.Event()

    def run(self) -> None:
        started_s = time.monotonic()
        count = 0
        while not self._ended.wait(0.01):
            count += 1
            time_s = NOW_S + time.monotonic() - started_s
            self._controller.counted = dataclasses.replace(LOADS, time_s=time_s, tokens={"router": {0: (count, 0)}})

    def __enter__(self) -> "Counting":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


@pytest.mark.usefixtures("server")
def test_a_recording_is_a_trace_that_is_gone_on_with(run, controller, tmp_path) -> None:
    out = str(tmp_path / "loads.jsonl")
    with Counting(controller):
        for _ in range(2):
            recorded = run("record", out, "--window-s", "0.3", "--for-s", "0.9")
            assert recorded.code == 0 and recorded.out.startswith(f"windows added to {out}: ")
    trace = open_trace(out)
    windows = list(trace.windows())
    assert trace.header.model == LOADS.model and trace.header.window_s == 0.3
    assert 3 <= len(windows) <= 6
    assert all(window.counts_LE[0, 0] > 0 and window.counts_LE[1].sum() == 0 for window in windows)


@pytest.mark.usefixtures("server")
def test_a_file_that_is_no_trace_is_left_as_it_is(run, tmp_path) -> None:
    mine = tmp_path / "notes.txt"
    mine.write_text("my notes\n")
    refused = run("record", str(mine), "--window-s", "0.1", "--for-s", "0.1")
    assert refused.code == 2 and str(mine) in refused.err and refused.err.count("\n") == 1
    assert mine.read_text() == "my notes\n"


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_recording_that_is_interrupted_is_whole(controller, tmp_path, number) -> None:
    out = tmp_path / "loads.jsonl"
    command = [sys.executable, "-c", "from moecluster.cli.app import main; main()", "record", str(out)]
    with Counting(controller):
        recording = subprocess.Popen(
            [*command, "--window-s", "0.2", "--for-s", "0"],
            env=dict(os.environ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts background jobs with SIGINT ignored, and these tests may be such a job.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        wait_until(
            lambda: (out.exists() and out.read_bytes().count(b"\n") >= 4) or recording.poll() is not None,
            "a recording of three windows",
        )
        assert recording.poll() is None, recording.communicate()
        recording.send_signal(number)
        output, complaints = recording.communicate(timeout=WAIT_S)
    assert recording.returncode == (0 if number == signal.SIGINT else 128 + number)
    assert f"windows added to {out}: " in output
    assert complaints == ("" if number == signal.SIGINT else "moecluster: ended by SIGTERM\n")
    assert len(list(open_trace(out).windows())) >= 3
