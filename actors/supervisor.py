"""Finds, restarts, creates and removes expert actors and routers in Ray, for the controller."""

import time
from collections.abc import Collection
from contextlib import suppress

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # as in Ray Serve: no public API has draining nodes
from ray.exceptions import RayError

from actors.expert_actor import ExpertActor
from actors.given_directories import GivenDirectories
from actors.names import CONTROLLER, EXPERT_PREFIX, is_router, metrics_port
from actors.ray_calls import call, end_actors, find_actor, named_actors
from actors.router_actor import RouterActor
from actors.spawn import spawn
from moecluster.config import Config
from moecluster.errors import MoeClusterError, Unavailable
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.types import ActorAddress

POLL_S = 0.05
ASK_AGAIN_S = 2.0
GCS_TIMEOUT_S = 2.0
END_TIMEOUT_S = 15.0


class RaySupervisor:
    """An ActorSupervisor and a RouterSupervisor. Every call ends within a finite time."""

    def __init__(self, config: Config, credentials: ClusterCredentials) -> None:
        self._config = config
        self._credentials = credentials
        self._namespace = config.cluster.name
        self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)

    def address_of(self, actor: str, timeout_s: float) -> ActorAddress | None:
        """Returns the actor's current address; waits while Ray restarts it. None after the timeout."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                handle = find_actor(actor, self._namespace)
                # A call to an incarnation that is just ending may never be answered: ask again.
                address: ActorAddress = call(handle.address.remote(), min(ASK_AGAIN_S, left_s), actor)
                return address
            except MoeClusterError:
                time.sleep(min(POLL_S, left_s))
        return None

    def restart(self, actor: str) -> None:
        """Kills a process that hangs; Ray starts a new one."""
        try:
            ray.kill(find_actor(actor, self._namespace), no_restart=False)
        except (MoeClusterError, RayError):
            return  # gone already

    def known(self) -> tuple[str, ...]:
        """Returns the expert actors of the namespace: alive, or being started."""
        return tuple(name for name in named_actors(self._namespace) if name.startswith(EXPERT_PREFIX))

    def existing_routers(self) -> tuple[str, ...]:
        """Returns the routers of the namespace: alive, or being started."""
        return tuple(name for name in named_actors(self._namespace) if is_router(name))

    def create(self, actor: str, *, avoid_nodes: Collection[str] = ()) -> None:
        """Asks Ray for an expert actor. While no node has room, it stays pending, visible to Ray's autoscaler."""
        port = metrics_port(self._config, actor)
        spawn(
            ExpertActor, "expert", self._config, actor,
            self._config.to_tables(), self._credentials, actor, port, avoid_nodes=avoid_nodes,
        )  # fmt: skip

    def create_router(self, router: str, checkpoint: str) -> None:
        """Asks Ray for a router, as create does for an expert actor."""
        port = metrics_port(self._config, router)
        spawn(
            RouterActor, "router", self._config, router,
            self._config.to_tables(), self._credentials, router, checkpoint, port,
        )  # fmt: skip

    def remove_router(self, router: str) -> None:
        """Kills a router for good."""
        self.remove(router)

    def remove(self, actor: str) -> None:
        """Kills an actor for good, so that its node may be released."""
        try:
            ray.kill(find_actor(actor, self._namespace), no_restart=True)
        except (MoeClusterError, RayError):
            return  # gone already

    def end_cluster(self) -> None:
        """Kills every actor of the cluster, and this controller last. Raises Unavailable if Ray does not answer."""
        end_actors(self._namespace, END_TIMEOUT_S, spare=[CONTROLLER])
        with suppress(Unavailable):  # the next cluster of this name forgets them when it starts
            GivenDirectories(self._namespace).forget_all()
        self.remove(CONTROLLER)

    def draining_nodes(self) -> frozenset[str]:
        """Returns the nodes that Ray reports as draining: by its autoscaler, or preempted by their cloud."""
        try:
            return frozenset(self._gcs.get_draining_nodes(timeout=GCS_TIMEOUT_S))
        except (RayError, RuntimeError):
            return frozenset()  # no answer now: the next call asks again
