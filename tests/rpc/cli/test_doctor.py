"""doctor as a user runs it, and its checks that need sockets."""

import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moecluster.cli.app import app
from moecluster.cli.commands.doctor import network
from moecluster.cli.commands.doctor.command import GROUPS
from moecluster.cli.commands.doctor.finding import Level
from moecluster.config import Config, read_config
from moecluster.errors import ConfigError
from tests.support.in_child import ROOT, finding_of

ISOLATED = ("unshare", "--net")  # a network whose loopback is down


def ran(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["doctor", *arguments], env=environment)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_a_sound_host_is_told_so_check_by_check(tmp_path: Path) -> None:
    output = f"train.output_dir={tmp_path}"
    code, text = ran("--json", "-s", output, "-s", "serve.port=0", environment={"XDG_STATE_HOME": str(tmp_path)})
    found: dict[str, Any] = json.loads(text)
    assert found["ready"] and code == 0, [check for check in found["checks"] if check["level"] == "problem"]
    assert {check["group"] for check in found["checks"]} == set(GROUPS)
    assert len({check["check"] for check in found["checks"]}) == len(found["checks"])
    assert all(bool(check["advice"]) is (check["level"] != "ok") for check in found["checks"])


def test_a_problem_is_exit_code_1_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecluster.cli.commands.doctor.command.GROUPS", ("machine", "network"))
    code, text = ran("demo", "-s", "cluster.num_expert_actors=100000")
    assert code == 1 and "lower cluster.num_expert_actors" in text
    assert "2 problems" in text and text.rstrip().endswith("a cluster cannot start here")


@pytest.mark.parametrize("given", [("nowhere",), ("-s", "cluster.num_expert_actors=0"), ("-s", "cluster.x=1")])
def test_wrong_settings_are_wrong_usage(given: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ["doctor", *given])
    assert isinstance(done.exception, ConfigError) and not done.output


def test_a_missing_package_does_not_hide_the_other_checks() -> None:
    script = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "psutil":
            raise ModuleNotFoundError("No module named 'psutil'", name="psutil")
sys.meta_path.insert(0, Hidden())
sys.argv = ["moecluster", "doctor", "--json"]
from moecluster.cli.app import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    found = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    assert "No module named 'psutil'" in found["limits"]["found"]
    assert found["Python"]["level"] == found["torch"]["level"] == "ok"


def test_a_taken_port_is_named() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        found = network.ports(read_config({"cluster": {"metrics_port": port}, "serve": {"port": 0}}))
        assert found.level is Level.PROBLEM, found
        assert f"port {port} of 127.0.0.1 (/metrics of router): Address already in use" in found.found
        found = network.ports(read_config({"serve": {"port": port}}))
        assert found.level is Level.WARNING and f"port {port} of 127.0.0.1 (serve.port)" in found.found
    assert network.ports(read_config({"serve": {"port": 0}})).level is Level.OK


def test_a_range_of_ports_that_is_too_narrow_is_a_problem() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        settings = {"port_range": f"{port}-{port}", "num_expert_actors": 2}
        found = network.ports(read_config({"cluster": settings, "serve": {"port": 0}}))
    assert found.level is Level.PROBLEM
    assert found.found == f"0 ports of {port}-{port} are free, and 4 actors take 8"
    assert "cluster.port_range" in found.advice
    settings = {"port_range": "20000-20999", "controller_port": 19999}
    assert network.ports(read_config({"cluster": settings, "serve": {"port": 0}})).level is Level.OK


def test_an_address_of_another_host_and_a_port_beyond_the_last_are_named() -> None:
    found = network.ports(read_config({"serve": {"host": "192.0.2.1"}}))
    assert found.level is Level.WARNING and "Cannot assign requested address" in found.found
    found = network.ports(read_config({"cluster": {"metrics_port": 65535}, "serve": {"port": 0}}))
    assert found.level is Level.PROBLEM and "port 65536" in found.found


def test_a_fixed_port_among_those_of_outgoing_connections_is_a_warning() -> None:
    low, high = (int(text) for text in network.EPHEMERAL.read_text().split())
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    assert low <= port <= high
    found = network.ports(read_config({"serve": {"port": port}}))
    assert found.level is Level.WARNING and "ip_local_reserved_ports" in found.advice


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a network")
def test_a_loopback_that_is_down_is_a_problem() -> None:
    assert network.loopback(Config()).level is Level.OK
    if subprocess.run([*ISOLATED, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace may be made here")
    found = finding_of("network", "loopback", prefix=ISOLATED)
    assert found["level"] == "problem" and "ip link set lo up" in found["advice"]
