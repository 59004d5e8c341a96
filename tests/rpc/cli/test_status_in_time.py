"""`status` ends in time whatever hangs, and reports what does not answer."""

import socket
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from actors import cluster_file, ray_poll
from actors.cluster_file import UpCluster
from moecluster.cli.commands.status import status
from moecluster.cli.common.cluster_choice import ClusterChoice
from moecluster.errors import Unavailable
from moecluster.rpc.controller.server import serve_controller
from moecluster.types import ControllerStatus
from tests.support.fakes.fake_controller import FakeController

HANGS = (sys.executable, "-c", "import time; time.sleep(1000)")
BREAKS = (sys.executable, "-c", "raise SystemExit(1)")
MUCH_LESS_S = 30.0  # than anything here hangs


def say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, controller: str) -> str:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    up = UpCluster(
        name="one",
        ray_address="127.0.0.1:1",
        model="/m",
        router_addresses=("127.0.0.1:2",),
        controller_address=controller,
        local_ray=None,
    )
    cluster_file.save(up)
    console = Console(width=300)
    with console.capture() as output:
        begun_s = time.monotonic()
        assert status(ClusterChoice(name="one"), False, 1.0, console)
        assert time.monotonic() - begun_s < MUCH_LESS_S
    return output.get()


def test_a_controller_and_a_ray_that_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_poll, "COMMAND", HANGS)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        output = say(monkeypatch, tmp_path, f"127.0.0.1:{silent.getsockname()[1]}")
    assert "degraded: no controller answers at 127.0.0.1:" in output
    assert "degraded: Ray did not say in time where the actors are" in output


class LateController(FakeController):
    """Gives no status until it is asked again."""

    asked = 0

    def status(self) -> ControllerStatus:
        self.asked += 1
        if self.asked == 1:
            raise Unavailable("busy")
        return super().status()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (HANGS, "note: Ray did not say in time where the actors are; --timeout-s gives it longer"),
        (BREAKS, "degraded: Ray cannot be asked where the actors are"),
    ],
    ids=["slow", "broken"],
)
def test_what_a_late_controller_says_is_shown_where_ray_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(ray_poll, "COMMAND", command)
    controller = LateController()
    server = serve_controller(controller, credentials=None)
    try:
        output = say(monkeypatch, tmp_path, server.address)
    finally:
        server.stop(0.0)
        controller.close()
    assert "term 2, placement 5" in output and "127.0.0.1:5000" in output
    assert said in output and output.count("degraded") == ("degraded" in said)


def test_a_controller_that_answers_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_poll, "COMMAND", ("no such command",))  # Ray is not asked
    controller = FakeController()
    server = serve_controller(controller, credentials=None)
    try:
        output = say(monkeypatch, tmp_path, server.address)
    finally:
        server.stop(0.0)
        controller.close()
    assert "term 2, placement 5" in output and "127.0.0.1:5000" in output
    assert "degraded" not in output and "note" not in output
