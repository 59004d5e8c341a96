"""Who reads the wall clock, which may be set at any moment: only those that must say or compare a date. All else counts
by clocks that nobody sets."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHY = {
    "actors/supervisor.py": "when Ray removes a node, which it says as a date",
    "moecluster/cli/commands/jobs.py": "how long a job has run that another host dated",
    "moecluster/cli/commands/token.py": "says when a token expires",
    "moecluster/cli/common/certificates.py": "the dates of a certificate",
    "moecluster/controller/controller.py": "dates loads, which a recorder checks for jumps",
    "moecluster/controller/state/operation_log.py": "dates the begin of operations",
    "moecluster/gateway/format_response.py": "the field created of OpenAI's answers",
    "moecluster/gateway/served_model.py": "the field created of OpenAI's models",
    "moecluster/http_client/batch/send.py": "Retry-After may be a date",
    "moecluster/metrics/process.py": "the start time of a process, by which Prometheus finds restarts",
    "moecluster/rpc/checkpoint/locked_folder.py": "the age of another process' folder, whose lock decides",
    "moecluster/rpc/tls/material.py": "warns of certificates that expire soon",
    "moecluster/rpc/tokens.py": "the dates of a token",
}
WALL = {f"time.{name}" for name in ("time", "time_ns", "localtime")} | {
    f"{kind}.{name}" for kind in ("datetime", "date") for name in ("now", "utcnow", "today")
}
# Their answers follow the wall clock, or wait by it.
FOLLOWING = {"create_time", "boot_time", "time_remaining"}


def readings(tree: ast.Module) -> Iterator[str]:
    """The names under which a module mentions the wall clock, called or handed on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ".".join(ast.unparse(node).split(".")[-2:])
            if name in WALL or node.attr in FOLLOWING:
                yield name
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (f"time.{alias.name}" for alias in node.names if f"time.{alias.name}" in WALL)


def test_only_who_must_tell_a_date_reads_the_wall_clock() -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("moecluster", "actors")
        for path in (ROOT / folder).rglob("*.py")
        if list(readings(ast.parse(path.read_text())))
    }
    assert found == set(WHY)


def test_no_wait_for_a_connection_follows_the_wall_clock() -> None:
    """gRPC's own future waits by it."""
    users = [
        str(path.relative_to(ROOT))
        for folder in ("moecluster", "actors")
        for path in (ROOT / folder).rglob("*.py")
        if "channel_ready_future" in path.read_text()
    ]
    assert users == ["moecluster/rpc/channels.py"]


def test_every_way_to_read_it_is_found() -> None:
    ways = ["time.time()", "f(clock=time.time)", "datetime.now(tz)", "from time import time", "p.create_time()"]
    assert all(list(readings(ast.parse(way))) for way in ways)
    assert not list(readings(ast.parse("time.monotonic(); self.now(); time.time_s; from_time.times")))
