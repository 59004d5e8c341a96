"""A cluster whose addresses are set, and used as another host does: by its controller's address and a copy of its
secret. The host is an address of the loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from moecluster.addresses import split_host_port
from tests.conftest import processes_of_this_session
from tests.support.clusters.local_rays import local_rays

COMMAND = [sys.executable, "-c", "from moecluster.cli.app import main; main()"]
TIMEOUT_S = 180.0
HOST = "127.0.0.9"
PORTS = 12  # of the range: two for each of four processes, and some more

pytestmark = pytest.mark.timeout(400)  # every command is a process with slow imports


class OneHost:
    """Commands of one user on one host."""

    def __init__(self, state_home: Path, environment: Mapping[str, str]) -> None:
        self.state = state_home / "moecluster"
        self._environment = {**os.environ, "XDG_STATE_HOME": str(state_home), "COLUMNS": "200", **environment}

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*COMMAND, *arguments], env=self._environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )


def free_ports() -> tuple[int, int]:
    """Returns the first and the last of some ports that are free now."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("", 0))).getsockname()[1]
            try:
                for port in range(first + 1, first + PORTS):
                    stack.enter_context(socket.create_server(("", port)))
                return first, first + PORTS - 1
            except OSError:
                continue


@pytest.fixture
def home(tmp_path: Path) -> Iterator[OneHost]:
    """The host of `up`, which others reach at HOST."""
    host = OneHost(tmp_path / "home", {"MOECLUSTER_ADVERTISED_HOST": HOST})
    yield host
    host.run("down")


def test_what_nobody_reaches_is_no_success_and_what_is_reached_works_from_elsewhere(
    home: OneHost, model: str, tmp_path: Path
) -> None:
    sizes = ("--set", "cluster.num_expert_actors=2", "--set", "controller.num_redundant_experts=4")
    refused = home.run("up", model, *sizes)  # each process listens on 127.0.0.1, and says that it is at HOST
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert f"router on node 127.0.0.1 does not reach expert-0 at {HOST}:" in refused.stderr
    assert "on node 127.0.0.1: Connection refused" in refused.stderr
    assert "MOECLUSTER_ADVERTISED_HOST" in refused.stderr and local_rays() == set()
    assert home.run("status").returncode == 3

    first, last = free_ports()
    up = home.run(
        "up", model, *sizes, *("--set", "cluster.host=0.0.0.0"), *("--set", "security.allow_plaintext=true"),
        *("--set", f"cluster.port_range={first}-{last}"),
        *("--set", f"cluster.controller_port={last}"), *("--set", f'cluster.directories=["{tmp_path}"]'),
    )  # fmt: skip
    assert up.returncode == 0, up.stderr
    assert f"controller     {HOST}:{last}" in up.stdout

    away = OneHost(tmp_path / "away", {"MOECLUSTER_SECRET_FILE": str(tmp_path / "secret")})
    shutil.copy(home.state / "moecluster.secret", tmp_path / "secret")
    where = ("--address", f"{HOST}:{last}")
    shown = json.loads(away.run("status", "--json", *where).stdout)
    assert shown["name"] == "moecluster" and shown["status"] == "ready", shown["problems"]
    assert set(shown["actors"]) == {"router", "controller", "expert-0", "expert-1"}
    for reached in shown["actors"].values():
        for address in (reached["address"], reached["metrics_address"]):
            host, port = split_host_port(address)
            assert host == HOST and first <= port <= last
        assert os.path.exists(f"/proc/{reached['pid']}")

    text = away.run("generate", "def main(", "--max-new-tokens", "5", *where)
    assert text.returncode == 0 and "5 tokens after a prompt of 9" in text.stderr, text.stderr
    placed = away.run("place", "0/0", "expert-0", "expert-1", "--id", "both", *where)
    assert placed.returncode == 0 and placed.stdout.startswith("both is done"), placed.stderr
    assert "both: place 0/0 expert-0 expert-1" in away.run("explain", "both", *where).stdout

    refused = away.run("update", "/models/elsewhere", *where)
    assert refused.returncode == 2 and "cluster.directories names others" in refused.stderr
    given = shutil.copytree(model, tmp_path / "given")
    updated = away.run("update", str(given), *where)
    assert updated.returncode == 0, updated.stderr

    down = away.run("down", *where)
    assert (down.returncode, down.stdout) == (0, f"the cluster at {HOST}:{last} is down\n"), down.stderr
    assert away.run("status", *where).returncode == 1
    left = [line for line in processes_of_this_session().values() if "ray::" in line]
    assert not [line for line in left if "Actor" in line], left
    assert home.run("down").returncode == 0 and local_rays() == set()
