"""Cluster starts that are interrupted at any moment: what they left behind is found, reported and ended."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from actors import cluster_file, launch
from actors.cluster_file import Start, UpCluster
from actors.local_ray import is_running, stop_local_ray
from actors.signals import signals_later
from moecluster.cli.commands import cluster as commands
from moecluster.cli.common.lookup import found
from moecluster.config import Config, read_config
from moecluster.errors import ResourceError

# A command that starts a cluster without Ray: a process with the mark stands in for it.
STARTER = """
import os, signal, subprocess, sys
from dataclasses import replace
from pathlib import Path
from actors import launch
from moecluster.config import read_config

moment = sys.argv[1]

def reached(name):
    if name != moment:
        return
    print("there", flush=True)
    sys.stdin.readline()

def start_local_ray(planned, timeout_s):
    reached("before Ray")
    subprocess.Popen(["sleep", "1000"], env={**os.environ, "MOECLUSTER_LOCAL_RAY": planned.mark})
    reached("while Ray starts")
    return replace(planned, address="127.0.0.1:1")

class Cluster:
    def start(self, config, model_dir, on_loading, *, credentials):
        reached("while actors start")

    def router_addresses(self):
        reached("after loading")
        return ("127.0.0.1:2",)

    def controller_address(self):
        return "127.0.0.1:3"

launch.start_local_ray = start_local_ray
launch.join = lambda name, address, local: Cluster()
launch.leave = lambda: None
launch._refuse_wrong_model = lambda model_dir: None
from actors.signals import end_by_signals
with end_by_signals():
    launch.bring_up(read_config({"cluster": {"name": "one"}}), "/models/tiny")
"""
MOMENTS = ("before Ray", "while Ray starts", "while actors start", "after loading")
CONFIG: Config = read_config({"cluster": {"name": "one"}})


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(launch, "_refuse_wrong_model", lambda model_dir: None)


def starter(moment: str) -> "subprocess.Popen[str]":
    """A command in the middle of a start."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, moment], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    return process


@pytest.fixture(params=MOMENTS)
def broken(request: pytest.FixtureRequest) -> Iterator[Start]:
    """A start ended by SIGKILL at a given moment."""
    with starter(request.param) as process:
        process.kill()
    start = cluster_file.load_start("one")
    assert start is not None and start.local_ray is not None and start.pid == process.pid
    assert is_running(start.local_ray) == (request.param != "before Ray")
    yield start
    launch.end_start("one")


def nothing_is_left(start: Start) -> bool:
    assert start.local_ray is not None
    return not (is_running(start.local_ray) or Path(start.local_ray.folder).exists() or cluster_file.load_start("one"))


def said_by_down() -> str:
    console = Console(width=200)
    with console.capture() as output:
        commands.down("one", console)
    return output.get()


def test_a_start_that_was_killed_at_any_moment_is_said_and_ended_by_down(broken: Start) -> None:
    with pytest.raises(ResourceError, match=rf"was broken off \(process {broken.pid} has ended\): moecluster down --n"):
        found("one")
    assert "the start of cluster one is ended" in said_by_down()
    assert nothing_is_left(broken)
    with pytest.raises(ResourceError, match="no cluster one is up"):
        commands.down("one", Console())


def test_the_next_start_ends_what_is_left_of_one_that_was_killed(
    broken: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Config, start: Start, *_: object) -> UpCluster:
        assert broken.local_ray is not None and not is_running(broken.local_ray)
        assert start.local_ray is not None and start.local_ray.mark != broken.local_ray.mark
        raise ResourceError("no room")

    monkeypatch.setattr(launch, "_start", refuse)
    with pytest.raises(ResourceError, match="no room"):
        launch.bring_up(CONFIG, "/models/tiny")
    assert nothing_is_left(broken)


def test_a_note_of_a_machine_that_was_started_again_is_ended() -> None:
    """Nothing that the note names exists any more, and its pid belongs to another process: this one."""
    with starter("while Ray starts") as process:
        process.kill()
    start = cluster_file.load_start("one")
    assert start is not None and start.local_ray is not None
    stop_local_ray(start.local_ray)
    cluster_file.save(Start(**{**vars(start), "pid": os.getpid()}))
    assert "is ended" in said_by_down()
    assert nothing_is_left(start)


def test_of_two_starts_at_once_one_is_refused() -> None:
    with starter("while actors start") as first:
        with pytest.raises(ResourceError, match=rf"is being started by process {first.pid}: wait for it, or end"):
            launch.bring_up(CONFIG, "/models/tiny")
        with pytest.raises(ResourceError, match=rf"is being started by process {first.pid}"):
            found("one")
        assert first.stdin is not None
        first.stdin.write("go on\n")
        first.stdin.close()
        assert first.wait() == 0
    up = cluster_file.load("one")
    assert up is not None and up.local_ray is not None and is_running(up.local_ray)
    launch.take_down(up)
    assert not is_running(up.local_ray)


def test_down_ends_a_start_that_is_under_way() -> None:
    with starter("while Ray starts") as process:
        start = cluster_file.load_start("one")
        assert start is not None
        assert "the start of cluster one is ended" in said_by_down()
        assert process.wait() == 128 + signal.SIGTERM
    assert nothing_is_left(start)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_start_that_is_signalled_leaves_nothing(number: signal.Signals) -> None:
    with starter("while actors start") as process:
        start = cluster_file.load_start("one")
        assert start is not None
        process.send_signal(number)
        process.wait()
    assert nothing_is_left(start)


def test_a_signal_amid_what_sets_its_own_handlers_comes_afterwards_and_to_ours() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    reached = False
    try:
        with pytest.raises(KeyboardInterrupt), signals_later():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # To this thread: another test may have left a thread that would take the process's signal.
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            reached = True
    finally:
        signal.signal(signal.SIGTERM, before)
    assert reached
