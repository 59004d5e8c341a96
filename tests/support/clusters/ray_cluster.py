"""A real cluster of Ray actors for a test module, with what tests observe in it and do to it.

@pytest.fixture(scope="module")
def cluster(ray_session, directory):
    with RayCluster(directory, {"cluster": {"num_expert_actors": 2}}) as running:
        yield running
"""

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from actors.driver import CALL_TIMEOUT_S, Cluster
from actors.ray_calls import controller_resolver
from actors.router_actor import make_remote_experts
from moecluster.client import Client
from moecluster.config import read_config
from moecluster.config.load import override
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import MoeClusterError
from moecluster.metrics import Metrics
from moecluster.rpc.controller.client import controller_status
from moecluster.rpc.controller.subscription import ControllerClient
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.types import ActorPhase, ControllerStatus

FoundT = TypeVar("FoundT")

WAIT_S = 60.0
POLL_S = 0.1
CREDENTIALS = ClusterCredentials.make()  # of all clusters of this test process


class RayCluster:
    """Expert actors, a controller and a router in a Ray namespace of their own. The test must have joined Ray."""

    def __init__(
        self,
        directory: str | Path,
        tables: Mapping[str, Any] | None = None,
        on_loading: Callable[[int, int], None] | None = None,
    ) -> None:
        """tables: settings other than the defaults, by section. Returns when all actors serve."""
        name = f"test-{uuid.uuid4().hex[:8]}"
        self.config = read_config(override(tables or {}, {"cluster.name": name}))
        self.driver = Cluster(name)
        self.driver.start(self.config, str(directory), on_loading, credentials=CREDENTIALS)
        self.router_address = self.driver.router_address()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.stop()

    def client(self) -> Client:
        return Client(self.router_address, credentials=CREDENTIALS)

    @contextmanager
    def placements(self) -> Iterator[ControllerClient]:
        """Context: the controller's placements, as a router receives them."""
        name = self.config.cluster.name
        client = ControllerClient(
            router=f"test-{uuid.uuid4().hex[:8]}", resolve=controller_resolver(name), credentials=CREDENTIALS
        )
        try:
            yield client
        finally:
            client.close()

    @contextmanager
    def remote_experts(self, *, hold: bool = False) -> Iterator[RemoteExperts]:
        """Context: RemoteExperts in the test's process, made as in a router actor. hold: the placement is held."""
        with self.placements() as placements:
            if hold:
                placements.hold(WAIT_S)
            remote = make_remote_experts(self.config, placements, Metrics(model="test"), CREDENTIALS)
            try:
                yield remote
            finally:
                remote.close()

    def pids(self, timeout_s: float = CALL_TIMEOUT_S, *, names: Sequence[str] | None = None) -> dict[str, int]:
        """Returns the pid of every actor, or of the named ones, that answers within the timeout."""
        found = self.driver.endpoints(timeout_s, names=names)
        return {name: reached.pid for name, reached in found.items() if reached is not None}

    def kill(self, actor: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal to an actor's process, as soon as it has one; returns its pid."""
        pid = wait_for_result(lambda: self.pids().get(actor), f"{actor} has a process")
        os.kill(pid, number)
        return pid

    def status(self) -> ControllerStatus | None:
        """Returns the controller's status; None while it does not answer."""
        try:
            return controller_status(self.driver.controller_address(), credentials=CREDENTIALS)
        except MoeClusterError:
            return None

    def wait_served(self) -> ControllerStatus:
        """Waits until every expert actor serves, according to the controller."""

        def served() -> ControllerStatus | None:
            status = self.status()
            return status if status and all(actor.phase is ActorPhase.SERVING for actor in status.actors) else None

        return wait_for_result(served, "every expert actor serves")


def wait_for_result(look: Callable[[], FoundT | None], what: str, timeout_s: float = WAIT_S) -> FoundT:
    """Calls look until its result is true; returns that result."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline_s, f"it did not come true within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)
    return found
