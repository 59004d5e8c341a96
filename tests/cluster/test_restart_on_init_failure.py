"""An actor whose restart fails because a dependency is missing, and succeeds once it is back."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.support.clusters.ray_cluster import wait_for_result
from tests.support.clusters.ray_session import RaySession
from tests.support.fakes.failing_shell import FailingShell


def start(needed: Path, attempts: Path) -> Any:
    actor_class: Any = ray.remote(FailingShell)
    return actor_class.options(max_restarts=-1).remote(str(needed), str(attempts))


def pid_of(actor: Any) -> int | None:
    try:
        return int(ray.get(actor.pid.remote(), timeout=1.0))
    except ray.exceptions.RayError:
        return None


def test_an_actor_that_cannot_begin_anew_tries_until_it_can(ray_session: RaySession, tmp_path: Path) -> None:
    needed, attempts = tmp_path / "needed", tmp_path / "attempts"
    needed.touch()
    actor = start(needed, attempts)
    wait_for_result(lambda: pid_of(actor) is not None, "it is there")
    pid = pid_of(actor)
    assert pid is not None
    needed.unlink()
    os.kill(pid, signal.SIGKILL)
    wait_for_result(lambda: len(attempts.read_text().split()) >= 2, "it has tried")
    needed.touch()
    wait_for_result(lambda: pid_of(actor) not in (None, pid), "it is back")


def test_an_actor_that_cannot_begin_at_all_says_why(ray_session: RaySession, tmp_path: Path) -> None:
    actor = start(tmp_path / "needed", tmp_path / "attempts")
    with pytest.raises(ray.exceptions.ActorDiedError, match="needed is away"):
        ray.get(actor.pid.remote(), timeout=60.0)
