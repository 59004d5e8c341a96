"""clusters/onprem.yaml on the hosts of a lab: up, in use through its job server from `control`, down."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.hosts.lab import ADDRESSES, HostLab

ROOT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
FILE = "onprem.yaml"
JOB_SERVER = "http://127.0.0.1:8265"
TOKEN = "0123456789abcdef0123456789abcdef"
UP_TIMEOUT_S, COMMAND_TIMEOUT_S = 400.0, 200.0


class RayOnHosts:
    """A Ray cluster on a lab's hosts, started as docs/hosts.md says, from a copy of the file with other addresses."""

    def __init__(self, lab: HostLab) -> None:
        self.lab = lab
        control = lab.control
        control.environment |= {"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"}
        subprocess.run(["make", "--no-print-directory", "dist"], cwd=ROOT, check=True, capture_output=True)
        shutil.copytree(ROOT / "dist", control.home / "dist")
        self.moecluster("certs", "tls")
        token = control.home / ".ray" / "auth_token"
        token.parent.mkdir()
        token.touch(mode=0o600)
        token.write_text(TOKEN)
        (control.home / FILE).write_text(edited((ROOT / "clusters" / FILE).read_text()))

    def up(self) -> None:
        """ray up, until every node is there; then the job server is forwarded to `control`."""
        self.lab.control.run("ray", "up", "--yes", "--disable-usage-stats", FILE, timeout_s=UP_TIMEOUT_S)
        self.wait_for_nodes(len(ADDRESSES))
        self._dashboard = self.lab.control.start("ray", "dashboard", FILE)
        wait_for(self._answers, "the job server is reached", timeout_s=COMMAND_TIMEOUT_S)

    def down(self) -> None:
        """ray down. The connection of the job server is closed before."""
        self.lab.control.end(self._dashboard)
        self.lab.control.run("ray", "down", "--yes", FILE, timeout_s=COMMAND_TIMEOUT_S)

    def moecluster(self, *words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Runs moecluster on `control`."""
        return self.lab.control.run("moecluster", *words, check=check, timeout_s=COMMAND_TIMEOUT_S)

    def jobs(self) -> Mapping[str, Mapping[str, Any]]:
        """Returns all jobs by their ids."""
        return {job["id"]: job for job in json.loads(self.moecluster("jobs", "--json").stdout)}

    def log_of(self, job: str) -> str:
        """Returns what a job has printed, from the head's disk."""
        found = self.lab.hosts["head"].run(
            "bash", "-c", f"cat /tmp/ray/session_latest/logs/job-driver-{job}.log", check=False
        )
        return found.stdout

    def running_log_of(self, job: str) -> str:
        """Returns what a job has printed. Fails the test if the job has failed."""
        log, status = self.log_of(job), self.jobs()[job]["status"]
        assert status in ("PENDING", "RUNNING", "SUCCEEDED"), f"the job {job} is {status}:\n{log}"
        return log

    def wait_for_nodes(self, number: int, timeout_s: float = UP_TIMEOUT_S) -> None:
        """Waits until Ray has so many living nodes. If it does not, fails the test with the autoscaler's log."""
        what = f"there are {number} nodes"
        try:
            wait_for(lambda: len(self.nodes()) == number, what, timeout_s=timeout_s, every_s=2.0)
        except AssertionError as exc:
            logs = "/tmp/ray/session_latest/logs/monitor.log /tmp/ray/session_latest/logs/monitor.out"
            tail = self.lab.hosts["head"].run("bash", "-c", f"tail -n 200 {logs}", check=False).stdout
            raise AssertionError(f"{exc}\n{tail}") from exc

    def nodes(self) -> set[str]:
        """Returns the addresses of the nodes that Ray counts as alive."""
        code = (
            f"import ray; ray.init('{ADDRESSES['head']}:6379', logging_level=40, log_to_driver=False)\n"
            "print(*[node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']])"
        )
        head = self.lab.hosts["head"]
        python = "/root/moecluster/venv/bin/python"
        done = head.run(python, "-c", code, check=False, timeout_s=COMMAND_TIMEOUT_S, RAY_AUTH_MODE="token")
        return set(done.stdout.split()) if done.returncode == 0 else set()

    def _answers(self) -> bool:
        assert self._dashboard.poll() is None, self._dashboard.communicate()[0]
        return self.moecluster("jobs", check=False).returncode == 0


def wait_for(condition: Callable[[], object], what: str, *, timeout_s: float, every_s: float = 0.5) -> None:
    """Returns once the condition is true: of other hosts, which answer in seconds. Fails the test after timeout_s."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(every_s)


def edited(text: str) -> str:
    """Returns onprem.yaml with the lab's addresses, user and key: nothing else may have to be edited."""
    workers = ", ".join(address for name, address in ADDRESSES.items() if name != "head")
    values = {
        "head_ip": ADDRESSES["head"],
        "worker_ips": f"[{workers}]",
        "ssh_user": "root",
        "ssh_private_key": "~/.ssh/id_ed25519",
    }
    for key, value in values.items():
        text, count = re.subn(rf"^(\s+{key}): [^#\n]*", rf"\1: {value} ", text, flags=re.MULTILINE)
        assert count == 1, key
    return text
