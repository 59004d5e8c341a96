"""A local Ray that outlives the command that started it, and is stopped without touching any other Ray.

All its processes inherit a mark in their environment. Stopping kills those processes; `ray stop` would stop all Rays.
"""

import contextlib
import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from actors.places import make_socket_folder
from moecluster.addresses import join_host_port, split_host_port
from moecluster.errors import ResourceError

MARK = "MOECLUSTER_LOCAL_RAY"
HOST = "127.0.0.1"
END_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 3.0
POLL_AGAIN_S = 0.05  # finds processes that were being forked during the last look
GAVE_UP = "timed out"  # what `ray start` prints when it hits an internal limit that no setting extends
MIN_PATIENCE_S = 60.0  # Ray's defaults
SESSIONS = "ray"  # Ray makes its folder writable for everybody, so it is placed in one that only its owner may enter
OBJECT_STORE_BYTES = 128 * 2**20  # rows travel over gRPC; Ray's object store holds only call arguments
PORT_OPTIONS = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
                "metrics-export-port", "runtime-env-agent-port")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LocalRay:
    """A local Ray, planned or started."""

    address: str  # host:port
    mark: str  # value of the environment variable MARK in all its processes
    folder: str  # of its files; the token (mode 0600) is `token` in it
    auth: str  # token | disabled


def plan_local_ray(auth: str) -> LocalRay:
    """Returns a Ray with its mark and a new folder, to be recorded before it is started. The address is still empty."""
    return LocalRay(address="", mark=secrets.token_hex(8), folder=make_socket_folder(), auth=auth)


def start_local_ray(planned: LocalRay, timeout_s: float) -> LocalRay:
    """Starts a head node on the loopback, without dashboard. Raises ResourceError if it does not start in time; then,
    and if this is interrupted, stop_local_ray cleans up."""
    deadline_s = time.monotonic() + timeout_s
    token = Path(planned.folder) / "token"
    try:
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    except OSError as exc:
        raise ResourceError(f"a local Ray could not be started: {exc}") from exc
    while True:
        ports = _free_ports(len(PORT_OPTIONS))
        local = replace(planned, address=join_host_port(HOST, ports[0]))
        failure = _ray_start(local, ports, timeout_s, deadline_s)
        if not failure:
            return local
        if GAVE_UP not in failure.lower() or time.monotonic() > deadline_s:
            raise ResourceError(f"a local Ray could not be started: {failure}")
        _end_processes(local.mark)


def _ray_start(local: LocalRay, ports: Sequence[int], timeout_s: float, deadline_s: float) -> str:
    """Runs `ray start`, and returns its last line if it fails, else "". Raises ResourceError at the deadline."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--node-ip-address={HOST}"]
    command += [f"--{option}={port}" for option, port in zip(PORT_OPTIONS, ports, strict=True)]
    command += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={local.folder}/{SESSIONS}"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    # The user's settings take precedence. Ray's default lowers the priority of its workers.
    environment = {"RAY_worker_niceness": "0", **patience(timeout_s), **os.environ}
    environment |= {**ray_environment(local), MARK: local.mark}
    environment.pop("RAY_ADDRESS", None)
    left_s = max(deadline_s - time.monotonic(), 0.0)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left_s)
    except subprocess.TimeoutExpired as exc:
        raise ResourceError(
            f"a local Ray did not start within {timeout_s:g} s; cluster.start_timeout_s says how long to wait"
        ) from exc
    except OSError as exc:
        return str(exc)
    message = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return (message[-1].strip() if message else f"exit {done.returncode}") if done.returncode else ""


def patience(timeout_s: float) -> dict[str, str]:
    """Returns an environment with Ray's own start-up limits raised to at least timeout_s, for slow or busy machines."""
    seconds = str(math.ceil(max(timeout_s, MIN_PATIENCE_S)))
    return {
        "RAY_gcs_server_port_wait_time_s": seconds,
        "RAY_gcs_server_request_timeout_seconds": seconds,
        "RAY_raylet_start_wait_time_s": seconds,
        "RAY_worker_register_timeout_seconds": seconds,
        "RAY_agent_register_timeout_ms": f"{seconds}000",
    }


def ray_environment(local: LocalRay) -> dict[str, str]:
    """Returns the environment variables that a process needs to talk to this Ray."""
    variables = {
        "RAY_AUTH_MODE": local.auth,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Otherwise Ray uses this host's network address instead of 127.0.0.1, and listens on all addresses.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    if local.auth == "token":
        variables["RAY_AUTH_TOKEN_PATH"] = str(Path(local.folder) / "token")
    return variables


@dataclass(frozen=True, kw_only=True)
class RayProcess:
    """A living process of a local Ray."""

    pid: int
    part: str  # raylet, gcs_server, ...; ray::ExpertActor for an actor
    stopped: bool  # by a signal such as SIGSTOP


def processes_of(local: LocalRay) -> list[RayProcess]:
    """Returns its living processes."""
    found = []
    for process in _marked(local.mark):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            part = Path(words[0].split()[0]).name if words and words[0] else ""
            stopped = process.status() == psutil.STATUS_STOPPED
            found.append(RayProcess(pid=process.pid, part=part, stopped=stopped))
    return found


def is_running(local: LocalRay) -> bool:
    """Returns whether any of its processes is left."""
    return bool(_marked(local.mark))


def is_gone(address: str) -> bool:
    """Returns whether a Ray's address (host:port) refuses connections. A host that is silent may come back."""
    try:
        socket.create_connection(split_host_port(address), timeout=CONNECT_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
    return False


def stop_local_ray(local: LocalRay) -> None:
    """Kills every process of this Ray and removes its files. May be repeated."""
    _end_processes(local.mark)
    shutil.rmtree(local.folder, ignore_errors=True)


def _end_processes(mark: str) -> None:
    deadline_s = time.monotonic() + END_TIMEOUT_S
    looks_without = 0
    while looks_without < 2 and time.monotonic() < deadline_s:
        left = _marked(mark)
        looks_without = 0 if left else looks_without + 1
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # there is no state to save, and a graceful end takes seconds
        psutil.wait_procs(left, timeout=1.0)
        time.sleep(POLL_AGAIN_S)


def _marked(mark: str) -> list[psutil.Process]:
    """Returns the living processes that inherited the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # gone meanwhile, or another user's
    return found


def _free_ports(count: int) -> list[int]:
    """Returns different ports that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for taken in sockets:
            taken.bind((HOST, 0))
        return [int(taken.getsockname()[1]) for taken in sockets]
