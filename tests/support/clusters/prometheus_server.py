"""A real Prometheus for tests, from the PATH (make system-deps); without one the tests are skipped, with a message.

def test_something(prometheus: RunningPrometheus) -> None:
    prometheus.scrape(f"127.0.0.1:{port}")  # every SCRAPE_INTERVAL_S from now on; replaces earlier targets
    prometheus.address                      # of its HTTP API
"""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from moecluster.cli.common.certificates import Authority
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.scopes import Scope
from moecluster.rpc.tls.material import NAME
from moecluster.rpc.tokens import make_token
from tests.support.certificates import write_certificates

SCRAPE_INTERVAL_S = 0.2
SCRAPED = ClusterCredentials(secret="p" * 43)  # of what is scraped: the server has a token with the scope read
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0
LISTENS = re.compile(r'msg="Listening on".* address=(\S+)')


@dataclass(frozen=True, kw_only=True)
class RunningPrometheus:
    """A running server."""

    address: str  # http://host:port
    folder: Path  # of its configuration, targets, data and log

    @property
    def tls_dir(self) -> Path:
        """A folder of certificates whose CA the server believes."""
        return self.folder / "tls"

    def scrape(self, *targets: str, scheme: str = "http") -> None:
        """Scrapes /metrics of these host:port only. Prometheus takes up to 5 s to notice."""
        _write_targets(self.folder, targets, scheme)


def check_config(path: Path) -> None:
    """Fails the test with promtool's message if Prometheus would refuse a configuration."""
    answer = subprocess.run(["promtool", "check", "config", str(path)], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.fixture
def promtool() -> None:
    """Skips the test if promtool is not installed."""
    _skip_without("promtool")


@pytest.fixture
def prometheus(prometheus_folder: Path) -> Iterator[RunningPrometheus]:
    """A ready server on a free loopback port, without targets; stopped after the test."""
    _write_targets(prometheus_folder, ())
    with prometheus_of(prometheus_folder, _config(prometheus_folder)) as running:
        yield running


@pytest.fixture
def prometheus_folder(tmp_path: Path) -> Path:
    """A folder for a server, with certificates (tls), and a token to read what has the credentials SCRAPED (token)."""
    _skip_without("prometheus")
    folder = tmp_path / "prometheus"
    folder.mkdir()
    write_certificates(folder / "tls", Authority.make())
    token = make_token(SCRAPED, scopes=[Scope.READ], subject="prometheus", lifetime_s=3600)
    (folder / "token").write_text(token)
    return folder


@contextmanager
def prometheus_of(folder: Path, config: Mapping[str, object]) -> Iterator[RunningPrometheus]:
    """Runs a server on a free loopback port with a configuration; yields when it is ready."""
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        yield RunningPrometheus(address=_wait_until_ready(process, folder / "log"), folder=folder)
    finally:
        process.terminate()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _skip_without(command: str) -> None:
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed: make system-deps")


def _config(folder: Path) -> dict[str, object]:
    interval = f"{SCRAPE_INTERVAL_S * 1000:.0f}ms"
    targets = {"files": [str(folder / "targets.json")], "refresh_interval": "1s"}
    return {
        "global": {"scrape_interval": interval, "scrape_timeout": interval},
        "scrape_configs": [
            {
                "job_name": "moecluster",
                "file_sd_configs": [targets],
                "authorization": {"credentials_file": str(folder / "token")},
                "tls_config": {"ca_file": str(folder / "tls" / "ca.crt"), "server_name": NAME},
            }
        ],
    }


def _write_targets(folder: Path, targets: tuple[str, ...], scheme: str = "http") -> None:
    content = [{"targets": list(targets), "labels": {"__scheme__": scheme}}]
    (folder / "targets.new").write_text(json.dumps(content))
    (folder / "targets.new").rename(folder / "targets.json")  # atomic: Prometheus never reads a partial file


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Returns the address of the HTTP API, once it answers."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        listens = LISTENS.search(log.read_text())
        if listens:
            address = f"http://{listens[1]}"
            try:
                with urllib.request.urlopen(f"{address}/-/ready", timeout=5):
                    return address
            except OSError:
                pass  # it listens before it is ready
        time.sleep(0.02)
    pytest.fail(f"prometheus did not become ready: {log.read_text()[-2000:]}")
