"""Commands to a cluster that is known by its controller's address and its secret alone."""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moecluster.cli.app import main
from moecluster.cli.commands import cluster as cluster_commands
from moecluster.cli.commands import operations as operation_commands
from moecluster.cli.common import live_controller
from moecluster.cli.common.cluster_choice import ClusterChoice
from moecluster.cli.common.live_controller import LiveController
from moecluster.rpc.controller.server import serve_controller
from moecluster.rpc.credentials import SECRET_FILE_VARIABLE, ClusterCredentials, write_secret
from moecluster.rpc.server import RunningServer
from moecluster.types import ControllerStatus, ProcessInfo, RouterState
from tests.support.fakes.fake_controller import OLD_OPERATION, PLACEMENT, FakeController
from tests.support.fakes.fake_router import FakeRouter

CREDENTIALS = ClusterCredentials.make()
NOBODY = "127.0.0.1:1"

Run = Callable[..., SimpleNamespace]


class NamedController(FakeController):
    """Also knows the processes of a cluster."""

    def status(self) -> ControllerStatus:
        seen = super().status()
        process = ProcessInfo(pid=7001, node="10.0.0.1", metrics_address="10.0.0.1:9100")
        actors = tuple(replace(actor, process=replace(process, pid=7002)) for actor in seen.actors)
        return replace(seen, cluster="far", process=process, actors=actors)


@pytest.fixture
def controller() -> Iterator[NamedController]:
    scripted = NamedController()
    scripted.publish(PLACEMENT)
    yield scripted
    scripted.close()


@pytest.fixture
def server(controller: NamedController) -> Iterator[RunningServer]:
    running = serve_controller(controller, credentials=CREDENTIALS)
    yield running
    running.stop(0.0)


@pytest.fixture
def router(controller: NamedController, server: RunningServer) -> Iterator[FakeRouter]:
    with FakeRouter(credentials=CREDENTIALS) as running:
        controller.states["router"] = RouterState(router="router", address=running.address)
        running.controller = server.address
        yield running


@pytest.fixture
def secret(tmp_path: Path) -> str:
    """A copy of the cluster's secret."""
    file = tmp_path / "far.secret"
    write_secret(file, CREDENTIALS)
    return str(file)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Runs the command line on a host that knows no cluster; returns its exit code and output."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv(SECRET_FILE_VARIABLE, raising=False)
    monkeypatch.setattr(operation_commands, "POLL_S", 0.01)

    def run_command(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["moecluster", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert "Traceback" not in output.err + output.out
        return SimpleNamespace(code=ended.value.code or 0, out=output.out, err=output.err)

    yield run_command
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("by", ["option", "environment"])
def test_operations_are_asked_for_and_waited_for(
    run: Run, controller: NamedController, server: RunningServer, secret: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--address", server.address]
    if by == "option":
        where += ["--secret-file", secret]
    else:
        monkeypatch.setenv(SECRET_FILE_VARIABLE, secret)
    done = run("scale", "3", "--id", "evening", *where)
    assert (done.code, done.out, done.err) == (0, "evening is done after 1.0 s: no replica moved\n", "")
    assert run("drain", "node-a", "--id", "night", *where).out.startswith("night is done")
    listed = json.loads(run("operations", "--json", *where).out)
    assert [operation["id"] for operation in listed] == ["night", "evening", OLD_OPERATION.id]
    assert "evening: scale 3" in run("explain", "evening", *where).out
    assert "share: expert 3/1 is hot" in run("plan", *where).out
    updated = run("update", "/models/next", "--id", "next", *where)
    assert updated.code == 0 and controller.operation("next").arguments == ("/models/next",)
    assert run("update", "next", *where).err.startswith("moecluster: DIR: got next, expected an absolute path")


def test_status_shows_every_process_without_asking_ray(
    run: Run, server: RunningServer, router: FakeRouter, secret: str
) -> None:
    where = ("--address", server.address, "--secret-file", secret)
    shown = run("status", *where)
    assert shown.code == 0 and "cluster far serves /first" in shown.out
    rows = {line.split()[0]: line.split()[1:] for line in shown.out.splitlines() if line.split()}
    assert rows["controller"] == ["serving", server.address, "10.0.0.1:9100", "7001"]
    assert rows["expert-0"] == ["serving", "3", "0", "127.0.0.1:5000", "10.0.0.1:9100", "7002"]
    assert rows["router"][:4] == ["serving", "0", "0", router.address]
    plain = json.loads(run("status", "--json", *where).out)
    assert plain["name"] == "far" and plain["actors"]["expert-1"]["pid"] == 7002


def test_status_says_why_rows_travel_inline(
    run: Run, controller: NamedController, server: RunningServer, router: FakeRouter, secret: str
) -> None:
    lane = "expert-1: the actor: 64 bytes of memory to share cannot be had (Cannot allocate memory)"
    controller.states["router"] = replace(controller.states["router"], inline_lanes=(lane,))
    where = ("--address", server.address, "--secret-file", secret)
    assert f"rows of router travel inline to {lane}" in run("status", *where).out.splitlines()
    plain = json.loads(run("status", "--json", *where).out)
    assert plain["controller"]["router_states"][0]["inline_lanes"] == [lane]


def test_generate_finds_the_routers(run: Run, server: RunningServer, router: FakeRouter, secret: str) -> None:
    where = ("--address", server.address, "--secret-file", secret)
    done = run("generate", "def main(", *where, "--max-new-tokens", "5", "--set", "serve.temperature=0.5")
    assert done.code == 0 and "5 tokens after a prompt of 2" in done.err and done.out.strip()
    assert router.requests[0].prompt == "def main(" and router.requests[0].sampling.temperature == 0.5
    refused = run("generate", "demo", "def main(", *where)
    assert refused.code == 2 and refused.err.startswith("moecluster: TARGET: got demo beside --address")
    assert run("generate", "def main(").err.startswith("moecluster: PROMPT: missing; expected TARGET PROMPT, or --addr")


def test_down_waits_until_the_controller_is_gone(
    run: Run, controller: NamedController, server: RunningServer, secret: str
) -> None:
    ending = threading.Timer(0.2, server.stop, args=(0.0,))
    controller.on_end = ending.start
    done = run("down", "--address", server.address, "--secret-file", secret)
    assert (done.code, done.out) == (0, f"the cluster at {server.address} is down\n") and controller.ended
    ending.join()


def test_down_says_that_a_cluster_does_not_end(
    run: Run, controller: NamedController, server: RunningServer, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_commands, "END_TIMEOUT_S", 0.1)
    refused = run("down", "--address", server.address, "--secret-file", secret)
    assert refused.code == 1 and "has not ended within 0.1 s; its controller's log says why" in refused.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--address", "nowhere"), '--address: got "nowhere", expected HOST:PORT'),
        (("--address", "::1:80"), '--address: got "::1:80", expected HOST:PORT, an IPv6 address in brackets'),
        (("--address", NOBODY, "--name", "one"), "--name: got one beside --address, expected one of the two"),
        (("--secret-file", "far.secret"), "--secret-file: goes with --address"),
        (("--address", NOBODY), f"the cluster at {NOBODY}: asks for its secret; give a copy of the file that"),
        (("--address", NOBODY, "--secret-file", "none"), "none: the cluster secret cannot be read"),
    ],
)
@pytest.mark.parametrize("command", [("status",), ("operations",), ("scale", "3")])
def test_a_wrong_choice_is_one_line(run: Run, command: tuple[str, ...], arguments, line: str) -> None:
    refused = run(*command, *arguments)
    assert refused.code == 2 and refused.err.startswith(f"moecluster: {line}") and refused.err.count("\n") == 1


def test_a_wrong_secret_is_said_at_once(run: Run, server: RunningServer, tmp_path: Path) -> None:
    other = tmp_path / "other.secret"
    write_secret(other, ClusterCredentials.make())
    for command in (("status",), ("operations",), ("generate", "def main(")):
        refused = run(*command, "--address", server.address, "--secret-file", str(other))
        assert refused.code == 1 and "authorization: the wrong secret" in refused.err


def test_a_controller_that_is_not_there(run: Run, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_controller, "PATIENCE_S", 0.1)
    where = ("--address", NOBODY, "--secret-file", secret)
    assert f"Unavailable: no controller answers at {NOBODY}" in run("status", *where).err
    silent = run("operations", *where)
    assert silent.code == 1 and f"no controller answers at {NOBODY}; trying for 0.1 s" in silent.err


def test_a_controller_that_has_moved_is_found_through_the_routers(
    controller: NamedController, server: RunningServer, router: FakeRouter, secret: str
) -> None:
    successor = serve_controller(controller, credentials=CREDENTIALS)
    with LiveController(ClusterChoice(address=server.address, secret_file=secret)) as live:
        assert live.ask(lambda calls: calls.address) == server.address
        assert live.ask(lambda calls: calls.status()).term == 2
        server.stop(0.0)
        router.controller = successor.address

        def where() -> str:
            return live.ask(lambda calls: (calls.status(), calls.address)[1])

        assert where() == successor.address
    successor.stop(0.0)
