"""Finds, restarts, creates and removes expert actors and routers in Ray, for the controller."""

import math
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # as in Ray Serve: no public API has draining nodes
from ray.exceptions import RayError

from actors.expert_actor import ExpertActor
from actors.fresh_answers import FreshAnswers
from actors.given_directories import GivenDirectories
from actors.names import CONTROLLER, EXPERT_PREFIX, is_router, metrics_port
from actors.ray_calls import call, end_actors, endpoints_of, find_actor, last_line, named_actors
from actors.router_actor import RouterActor
from actors.spawn import spawn
from moecluster.config import Config
from moecluster.errors import MoeClusterError, Unavailable
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.types import ActorAddress

POLL_S = 0.05
ASK_AGAIN_S = 2.0
GCS_TIMEOUT_S = 2.0
MAX_AGE_S = 3.0  # of what Ray says about the cluster
END_TIMEOUT_S = 15.0


class RaySupervisor:
    """An ActorSupervisor and a RouterSupervisor. Every call ends within a finite time."""

    def __init__(self, config: Config, credentials: ClusterCredentials) -> None:
        self._config = config
        self._credentials = credentials
        self._namespace = config.cluster.name
        self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        self._actors = FreshAnswers(
            lambda: named_actors(self._namespace), "which actors there are", max_age_s=MAX_AGE_S
        )
        self._draining = FreshAnswers(self._ask_draining, "which nodes are being drained", max_age_s=MAX_AGE_S)

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
        """Returns the expert actors of the namespace: alive, or being started. Raises Unavailable."""
        return tuple(name for name in self._names() if name.startswith(EXPERT_PREFIX))

    def existing_routers(self) -> tuple[str, ...]:
        """Returns the routers of the namespace: alive, or being started. Raises Unavailable."""
        return tuple(name for name in self._names() if is_router(name))

    def create(self, actor: str, *, avoid_nodes: Collection[str] = ()) -> None:
        """Asks Ray for an expert actor. While no node has room, it stays pending, visible to Ray's autoscaler. Raises
        Unavailable."""
        self._spawn(ExpertActor, "expert", actor, avoid_nodes=avoid_nodes)

    def create_router(self, router: str, checkpoint: str) -> None:
        """Asks Ray for a router, as create does for an expert actor."""
        self._spawn(RouterActor, "router", router, checkpoint)

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

    def draining_nodes(self) -> Mapping[str, float]:
        """Returns the nodes that Ray reports as draining, by its autoscaler or preempted by their cloud, and in how
        many seconds each is removed (inf: unknown). Raises Unavailable."""
        now_s = time.time()
        return {
            node: deadline_ms / 1e3 - now_s if deadline_ms > 0 else math.inf
            for node, deadline_ms in self._draining.get().items()
        }

    def routers_on(self, nodes: Collection[str]) -> frozenset[str]:
        """Returns the routers whose processes run on these nodes, and answer. Raises Unavailable."""
        return frozenset(router for router, node in self._router_nodes().items() if node in nodes)

    def shared_nodes(self) -> frozenset[str]:
        """Returns the nodes of this controller and of the routers that answer. Raises Unavailable."""
        return frozenset({ray.get_runtime_context().get_node_id(), *self._router_nodes().values()})

    def _names(self) -> list[str]:
        """Returns the names of all actors of the namespace. Raises Unavailable."""
        names = self._actors.get()
        if CONTROLLER not in names:  # this one: what else does the list lack?
            raise Unavailable(f"Ray's list of the actors of {self._namespace} is not complete")
        return names

    def _router_nodes(self) -> dict[str, str]:
        found = endpoints_of(self.existing_routers(), self._namespace, GCS_TIMEOUT_S)
        return {router: endpoints.node_id for router, endpoints in found.items() if endpoints is not None}

    def _ask_draining(self) -> dict[str, int]:
        """Returns node -> when it is removed, in milliseconds of Unix time; 0: unknown."""
        return dict(self._gcs.get_draining_nodes(timeout=GCS_TIMEOUT_S))

    def _spawn(self, shell: type, role: str, name: str, *arguments: Any, avoid_nodes: Collection[str] = ()) -> None:
        tables, port = self._config.to_tables(), metrics_port(self._config, name)
        try:
            spawn(
                shell, role, self._config, name,
                tables, self._credentials, name, *arguments, port, avoid_nodes=avoid_nodes,
            )  # fmt: skip
        except (RayError, RuntimeError, ValueError) as exc:
            raise Unavailable(f"Ray does not take the request for {name}: {last_line(exc)}") from exc
