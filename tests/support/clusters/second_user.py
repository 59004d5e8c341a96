"""Attacks on a cluster by another user of the host: a process of that user tries everything and reports the outcomes.

python -m tests.support.clusters.second_user UID < attempts.json > outcomes.json, started by root.
"""

import contextlib
import encodings.idna  # noqa: F401  # while its file may still be read
import http.client
import importlib
import json
import os
import pkgutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

from tests.support.clusters.every_method import Metadata, Method, code_of, guarded_methods, health_methods, methods_of

NOBODY = 65533  # a uid without a user on the host
CONNECT_S = 5.0
PAGES = ("/metrics", "/v1/models")
ATTEMPTS_S = 300.0
SECRETS: dict[str, Metadata] = {
    "no secret": (),
    "a wrong secret": (("authorization", f"Bearer {'w' * 43}"),),
}


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Outcomes of the other user's attempts."""

    calls: dict[str, dict[str, str]]  # port -> "secret method" -> status; empty: no gRPC server
    pages: dict[str, dict[str, int]]  # port -> "secret path" -> HTTP status; empty: no HTTP server
    files: dict[str, str]  # path -> allowed, if any attempt was, or refused


def listening(processes: Iterable[psutil.Process]) -> dict[int, tuple[str, str]]:
    """Returns port -> (address, command line) for all ports that the processes listen on."""
    found = {}
    for process in processes:
        for connection in process.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                found[connection.laddr.port] = (connection.laddr.ip, " ".join(process.cmdline())[:80])
    return found


def try_everything(ports: Iterable[int], paths: Iterable[Path | str], *, has_ray: bool = True) -> Outcomes:
    """As another user, calls every method and reads every page at every loopback port, and tries every kind of access
    to every path. has_ray: tries Ray's own methods, too."""
    attempts = json.dumps({"ports": sorted(ports), "paths": [str(path) for path in paths], "has_ray": has_ray})
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.clusters.second_user", str(NOBODY)],
        input=attempts, capture_output=True, text=True, timeout=ATTEMPTS_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return Outcomes(**json.loads(done.stdout))


def rays_methods() -> list[Method]:
    """Returns the methods of Ray's own services, from its generated modules."""
    import ray.core.generated as generated

    found = []
    for module in pkgutil.iter_modules(generated.__path__):
        if module.name.endswith("_pb2"):
            found += list(methods_of(importlib.import_module(f"{generated.__name__}.{module.name}")))
    return found


def _calls(port: int, methods: list[Method]) -> dict[str, str]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(CONNECT_S)
        except grpc.FutureTimeoutError:
            return {}
        return {
            f"{name} {method.path}": code_of(channel, method, metadata)[0].name
            for name, metadata in SECRETS.items()
            for method in methods
        }


def _pages(port: int) -> dict[str, int]:
    found = {}
    for name, metadata in SECRETS.items():
        for page in PAGES:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CONNECT_S)
            with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("GET", page, headers=dict(metadata))
                found[f"{name} {page}"] = connection.getresponse().status
    return found


def _outcome(path: str) -> str:
    """Returns "allowed" if any kind of access to the path succeeds, else "refused"."""
    attempts: list[Callable[[], object]] = [
        lambda: os.listdir(path),
        lambda: os.close(os.open(path, os.O_RDONLY)),
        lambda: os.close(os.open(path, os.O_WRONLY)),
        lambda: os.rename(path, f"{path}.moved"),
        lambda: socket.socket(socket.AF_UNIX).connect(path),
    ]
    for attempt in attempts:
        with contextlib.suppress(OSError):  # the error also depends on the kind of file
            attempt()
            return "allowed"
    return "refused"


def main() -> None:
    asked: dict[str, Any] = json.load(sys.stdin)
    methods = [*guarded_methods(), *health_methods(), *(rays_methods() if asked["has_ray"] else ())]
    uid = int(sys.argv[1])
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    calls = {str(port): _calls(port, methods) for port in asked["ports"]}
    outcomes = {
        "calls": calls,
        "pages": {port: {} if found else _pages(int(port)) for port, found in calls.items()},
        "files": {path: _outcome(path) for path in asked["paths"]},
    }
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
