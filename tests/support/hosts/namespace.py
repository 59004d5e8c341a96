"""Processes with a network, process table, mounts, host name and shared memory of their own, as a host has. Needs root.

Nothing of a namespace has a name: all of it is gone with its first process, which the kernel kills when the test
process ends, however that ends.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

COMMANDS = ("setpriv", "unshare", "nsenter", "ip")
ENTER_OPTIONS = ("--net", "--pid", "--mount", "--uts", "--ipc")
READY = "ready"
SCRIPT = """
set -e
hostname {name}
mount --make-rprivate /
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
mount -t tmpfs tmpfs /dev/shm -o size=1g
mount -t tmpfs tmpfs /run
for kept in {kept}; do # below /root, and needed
    mkdir -p "{home}/$kept"
    mount --bind "/root/$kept" "{home}/$kept"
done
mount --rbind {home} /root
ip link set lo up
{more}
echo {ready}
exec >&- 2>>{log}
sleep infinity & wait # bash, as the first process, reaps the orphans of daemons
"""


def lacking(*commands: str) -> str:
    """Returns what this machine lacks for namespaces and for these commands; empty if nothing."""
    if os.geteuid() != 0:
        return "root"
    missing = [command for command in (*COMMANDS, *commands) if shutil.which(command) is None]
    return f"{', '.join(missing)} (make system-deps installs them)" if missing else ""


def _below_root(path: Path) -> str:
    """Returns the path relative to /root, in quotes; empty if it lies elsewhere."""
    return shlex.quote(str(path.relative_to("/root"))) if path.is_relative_to("/root") else ""


class Namespace:
    """One such group of processes. Its /root is a directory of its own, so `~` is; all else but /tmp/ray is shared."""

    def __init__(
        self, name: str, home: Path, *, script: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        """script: more set-up, in bash. environment: of all commands, besides HOME, PATH and TERM."""
        home.mkdir(parents=True, exist_ok=True)
        self.name, self.home = name, home
        self.environment = {
            "HOME": "/root",
            "PATH": os.environ["PATH"],
            "TERM": "dumb",
            "RAY_USAGE_STATS_ENABLED": "0",
            **(environment or {}),
        }
        set_up = SCRIPT.format(
            name=name,
            home=shlex.quote(str(home)),
            kept=_below_root(Path(sys.base_prefix)),
            more=script,
            ready=READY,
            log=shlex.quote(str(home.with_suffix(".log"))),
        )
        kill_with_us = ("setpriv", "--pdeathsig", "KILL")
        unshare = ("unshare", *ENTER_OPTIONS, "--fork", "--kill-child=KILL", "--mount-proc")
        self._process = subprocess.Popen(
            [*kill_with_us, *unshare, "bash", "-c", set_up],
            env=dict(os.environ),  # with the variable by which tests/conftest.py finds what is left behind
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        if self._process.stdout.readline().strip() != READY:
            self.close()
            raise RuntimeError(f"{name} cannot be set up: {self._process.stderr.read().strip()}")

    @property
    def pid(self) -> int:
        """The first process, as this process sees it."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0])

    def command(self, *words: str) -> list[str]:
        """Returns a command line that runs a command inside, in the home directory."""
        return ["nsenter", "--target", str(self.pid), *ENTER_OPTIONS, "--", "env", "-C", "/root", *words]

    def run(
        self, *words: str, timeout_s: float = 60.0, check: bool = True, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a command inside. Raises AssertionError with its output if it fails."""
        done = subprocess.run(
            self.command(*words),
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, (
            f"{self.name}: {shlex.join(words)}: exit {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
        return done

    def start(self, *words: str, **variables: Any) -> "subprocess.Popen[str]":
        """Starts a command inside, which the end of the namespace ends."""
        return subprocess.Popen(
            self.command(*words),
            env={**self.environment, **{name: str(value) for name, value in variables.items()}},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @staticmethod
    def end(started: "subprocess.Popen[str]") -> None:
        """Kills a command that was started inside, and what it has started."""
        for process in psutil.Process(started.pid).children(recursive=True):
            process.kill()
        started.kill()
        started.wait()

    def processes(self) -> Sequence[str]:
        """Returns the command lines of all processes inside but the first, its child, and this look."""
        listed = self.run("ps", "-e", "-o", "pid=,args=").stdout.splitlines()
        found = [line.split(maxsplit=1)[1] for line in listed if line.split()[0] != "1"]
        return [line for line in found if not line.startswith(("ps -e", "sleep infinity"))]

    def close(self) -> None:
        """Kills everything inside. May be repeated."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
