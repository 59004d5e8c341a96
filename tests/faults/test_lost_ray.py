"""A local Ray whose start was interrupted or killed: the next command detects it, reports it and starts a new one."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.test_cli import COMMAND, ROOT
from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.clusters.local_rays import local_rays, parts
from tests.support.clusters.ray_cluster import wait_for_result

LONG_S = 400.0  # a start on a busy machine

pytestmark = pytest.mark.timeout(1500)


class Commands:
    """The command line, with its own state directory."""

    def __init__(self, state: Path) -> None:
        self._environment = {**os.environ, "XDG_STATE_HOME": str(state), "COLUMNS": "200"}

    def begin(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*COMMAND, *arguments],
            env=self._environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Returns exit code, standard output and standard error."""
        with self.begin(*arguments) as process:
            out, err = process.communicate(timeout=LONG_S)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    running = Commands(tmp_path_factory.mktemp("state"))
    yield running
    running.run("down")
    assert local_rays() == set()


def test_a_start_that_is_ended_by_sigterm_says_one_line_and_leaves_nothing(commands: Commands, model: str) -> None:
    """Also after the command has connected to Ray, which by itself prints a C++ stack trace on the signal."""
    with commands.begin("up", model, "--set", "cluster.num_expert_actors=2") as starting:
        wait_for_result(lambda: parts("ray::ControllerActor"), "actors are being started", LONG_S)
        starting.terminate()
        _, err = starting.communicate(timeout=LONG_S)
    assert (starting.returncode, err) == (128 + signal.SIGTERM, "moecluster: ended by SIGTERM\n")
    assert local_rays() == set()


def test_a_start_that_was_killed_is_found_and_the_next_one_takes_its_place(commands: Commands, model: str) -> None:
    with commands.begin("up", model, "--set", "cluster.num_expert_actors=2") as starting:
        wait_for_result(lambda: parts("gcs_server"), "Ray is being started", LONG_S)
        starting.kill()
    (left,) = local_rays()
    _, _, output = commands.run("status")
    assert f"was broken off (process {starting.pid} has ended): moecluster down ends what is left" in output
    code, _, output = commands.run("up", model, "--set", "cluster.num_expert_actors=2")
    assert code == 0, output
    (up,) = local_rays()
    assert up != left


def test_actors_are_as_nice_as_the_command_that_started_them(commands: Commands) -> None:
    actors = parts("ray::ExpertActor") + parts("ray::RouterActor") + parts("ray::ControllerActor")
    assert len(actors) == 4
    assert {actor.nice() for actor in actors} == {os.nice(0)}


def test_a_ray_whose_raylet_is_killed_is_said_within_seconds_and_ended_by_down(commands: Commands) -> None:
    (raylet,) = parts("raylet/raylet")
    raylet.suspend()
    code, output, _ = commands.run("status", "--timeout-s", "2")
    assert code == 0 and f"raylet (process {raylet.pid}) is stopped" in output
    raylet.kill()
    wait_for_result(lambda: not parts("raylet/raylet"), "the raylet has ended")
    code, output, _ = commands.run("status")
    assert code == 1 and "ended: Ray's raylet has ended, and every actor with it" in output
    code, _, output = commands.run("down")
    assert code == 0, output
    assert local_rays() == set()
