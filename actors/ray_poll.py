"""Asks Ray for a cluster's actors in a separate process: joining a hanging Ray may block for minutes in C++ code, and a
process can be killed."""

import dataclasses
import json
import os
import subprocess
import sys
from types import TracebackType
from typing import Self

from actors.cluster_file import UpCluster
from actors.local_ray import ray_environment
from actors.names import Endpoints
from moecluster.errors import DeadlineExceeded, MoeClusterError

COMMAND = (sys.executable, "-c", "from actors.ray_poll import main; main()")


class RayPoll:
    """Starts asking when constructed; the caller may do other work before it waits."""

    def __init__(self, cluster: UpCluster, timeout_s: float) -> None:
        """timeout_s: how long actors have to answer."""
        local = ray_environment(cluster.local_ray) if cluster.local_ray is not None else {}
        self._process = subprocess.Popen(
            [*COMMAND, cluster.name, cluster.ray_address, str(timeout_s)],
            env={**os.environ, **local},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # harmless if it has ended
        self._process.communicate()

    def wait(self, timeout_s: float) -> tuple[dict[str, Endpoints | None], str]:
        """Returns the actors' endpoints, None for one that does not answer; and Ray's problem, empty if it answered.

        Raises DeadlineExceeded if the process does not end in time: Ray hangs, or is slow on a busy host.
        """
        try:
            message, _ = self._process.communicate(timeout=max(timeout_s, 0.0))
            answer = json.loads(message)
            found = {name: Endpoints(**fields) if fields else None for name, fields in answer["actors"].items()}
            return found, str(answer["problem"])
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded("Ray did not say in time where the actors are") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}, "Ray cannot be asked where the actors are"


def main() -> None:
    """Prints one line of JSON."""
    name, address, timeout_s = sys.argv[1:]
    found: dict[str, Endpoints | None] = {}
    problem = ""
    try:
        from actors.joining import connect
        from actors.ray_calls import endpoints_of, named_actors

        connect(address)
        found = endpoints_of(named_actors(name), name, float(timeout_s))
    except MoeClusterError as exc:
        problem = str(exc)
    actors = {actor: dataclasses.asdict(at) if at is not None else None for actor, at in found.items()}
    print(json.dumps({"actors": actors, "problem": problem}), flush=True)
    os._exit(0)  # leaving Ray cleanly takes seconds, and may hang
