"""A local Ray of our own that outlives the command that started it, and is ended without touching any other.

Every process of it inherits a mark in its environment. What bears the mark is ended; `ray stop` would end all Rays.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from actors.places import make_socket_folder
from moecluster.errors import ResourceError

MARK = "MOECLUSTER_LOCAL_RAY"
HOST = "127.0.0.1"
START_TIMEOUT_S = 90.0
END_TIMEOUT_S = 10.0
SESSIONS = "ray"  # Ray lets everybody write into its folder, so that lies in one that only its owner enters
OBJECT_STORE_BYTES = 128 * 2**20  # rows travel over gRPC; Ray's own store holds only arguments of calls
PORT_OPTIONS = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
                "metrics-export-port", "runtime-env-agent-port")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LocalRay:
    """A started Ray."""

    address: str  # host:port
    mark: str  # value of the environment variable MARK in all its processes
    folder: str  # its files; the token (mode 0600) is `token` in it
    auth: str  # token | disabled


def start_local_ray(auth: str) -> LocalRay:
    """Starts a head on the loopback, without dashboard. Raises ResourceError if it does not come up."""
    folder = make_socket_folder()
    token = Path(folder) / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    ports = _free_ports(len(PORT_OPTIONS))
    local = LocalRay(address=f"{HOST}:{ports[0]}", mark=secrets.token_hex(8), folder=folder, auth=auth)
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--node-ip-address={HOST}"]
    command += [f"--{option}={port}" for option, port in zip(PORT_OPTIONS, ports, strict=True)]
    command += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}/{SESSIONS}"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    environment = {**os.environ, **ray_environment(local), MARK: local.mark}
    environment.pop("RAY_ADDRESS", None)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as exc:
        stop_local_ray(local)
        raise ResourceError(f"a local Ray could not be started: {exc}") from exc
    if done.returncode:
        stop_local_ray(local)
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise ResourceError(f"a local Ray could not be started: {said[-1] if said else f'exit {done.returncode}'}")
    return local


def ray_environment(local: LocalRay) -> dict[str, str]:
    """What a process needs in its environment to talk to this Ray."""
    variables = {
        "RAY_AUTH_MODE": local.auth,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else Ray takes the address of this host in its network for 127.0.0.1, and listens on all addresses.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    if local.auth == "token":
        variables["RAY_AUTH_TOKEN_PATH"] = str(Path(local.folder) / "token")
    return variables


def is_running(local: LocalRay) -> bool:
    """Whether any process of it is left."""
    return bool(_marked(local.mark))


def stop_local_ray(local: LocalRay) -> None:
    """Ends every process of this Ray and removes its files. Repeated is fine."""
    deadline_s = time.monotonic() + END_TIMEOUT_S
    while (left := _marked(local.mark)) and time.monotonic() < deadline_s:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # there is no state to save, and what is asked to end takes seconds
        psutil.wait_procs(left, timeout=1.0)
    shutil.rmtree(local.folder, ignore_errors=True)


def _marked(mark: str) -> list[psutil.Process]:
    """Living processes that inherited the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # gone meanwhile, or another user's
    return found


def _free_ports(count: int) -> list[int]:
    """Different ports that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for taken in sockets:
            taken.bind((HOST, 0))
        return [int(taken.getsockname()[1]) for taken in sockets]
