"""Starts, finds and stops a cluster: its named, detached actors in a Ray namespace of its own."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from actors.checkpoint_actor import CheckpointSource
from actors.controller_actor import ControllerActor
from actors.controller_config import controller_settings
from actors.expert_actor import ExpertActor
from actors.given_directories import GivenDirectories
from actors.loading_progress import LoadedBytes, bytes_to_load
from actors.names import (
    CONTROLLER,
    ROUTER,
    SOURCE,
    Endpoints,
    OnLoading,
    expert_names,
    is_router,
    metrics_ports,
    router_names,
)
from actors.preflight import check, has_other_nodes
from actors.ray_calls import call, end_actors, endpoints_of, find_actor, named_actors
from actors.reach import prove_reach
from actors.router_actor import RouterActor
from actors.spawn import spawn
from moecluster.config import Config
from moecluster.errors import DeadlineExceeded, ResourceError, Unavailable
from moecluster.models.experts.source import ExpertSource
from moecluster.placement.departures import number_of
from moecluster.placement.initial import initial_placement
from moecluster.placement.policy.registry import policy_named
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.router.training_run import TrainingRun

CALL_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 15.0
POLL_S = 0.1


class Cluster:
    """The actors of one namespace. All calls have finite timeouts; failures are MoeClusterErrors."""

    def __init__(self, name: str) -> None:
        """Requires that the driver has joined Ray. Does not contact the cluster."""
        self.name = name

    def start(
        self,
        config: Config,
        model_dir: str,
        on_loading: OnLoading | None = None,
        *,
        credentials: ClusterCredentials,
    ) -> None:
        """Starts the actors and loads the experts; returns when all of them serve.

        on_loading: called repeatedly with the bytes loaded so far. credentials: required by all its servers.
        Raises UserError if the model, placement, resources, addresses or ports do not fit, or if others could listen
        in; then everything started is stopped.
        """
        if self.exists():
            raise ResourceError(
                f"the cluster {self.name} is up already; take it down first (moecluster down), "
                "or give this one another cluster.name"
            )
        model_dir = os.path.abspath(model_dir)  # actors have other working directories
        source = ExpertSource(model_dir)
        layer_experts = {layer.layer: layer.num_experts for layer in source.layers}
        names = expert_names(config)
        replicas = initial_placement(config.controller.placement, layer_experts, names)
        controller_settings(config, model_dir, replicas, layer_experts)  # fail here rather than in the actor
        policy_named(config.controller.policy)
        check(config)
        credentials = replace(credentials, cluster=self.name, tls_dir=config.security.tls_folder)
        given = GivenDirectories(self.name)
        given.forget_all()  # left over from a cluster of this name that was not taken down
        try:
            for directory in (model_dir, *config.cluster.directories):
                given.give(directory)
            ports = metrics_ports(config)
            tables = config.to_tables()
            handles: dict[str, ActorHandle[Any]] = {}
            node = ray.get_runtime_context().get_node_id() if has_other_nodes(config) else ""
            if node:
                handles[SOURCE] = spawn(
                    CheckpointSource, "source", config, SOURCE, tables, credentials, model_dir, node=node
                )
            for name in router_names(config):
                # A training run writes its checkpoints where the first router is, and reads them where `up` runs. It
                # is started before the expert actors, so that there still is room for it.
                near = node if name == ROUTER else ""
                handles[name] = spawn(
                    RouterActor, "router", config, name, tables, credentials, name, model_dir, ports[name], near=near
                )
            for name in names:
                handles[name] = spawn(ExpertActor, "expert", config, name, tables, credentials, name, ports[name])
            handles[CONTROLLER] = spawn(
                ControllerActor, "controller", config, CONTROLLER,
                tables, credentials, model_dir, replicas, layer_experts, ports[CONTROLLER],
            )  # fmt: skip
            deadline_s = time.monotonic() + config.cluster.start_timeout_s
            endpoints = self._wait_ready(handles, config.cluster.start_timeout_s)
            prove_reach(handles, endpoints, credentials)
            total_bytes = bytes_to_load(source, replicas, getattr(torch, config.model.dtype))
            with LoadedBytes({name: endpoints[name].address for name in names}, credentials) as hosted:

                def look() -> None:
                    if on_loading is not None:
                        on_loading(hosted.total(), total_bytes)

                self._wait_loaded(deadline_s, look)
        except BaseException:
            self.stop()
            raise

    def exists(self) -> bool:
        """Returns whether the namespace has actors."""
        return bool(self.actors())

    def actors(self) -> list[str]:
        """Returns the names of the actors that are alive or being restarted."""
        return named_actors(self.name)

    def endpoints(
        self, timeout_s: float = CALL_TIMEOUT_S, *, names: Sequence[str] | None = None
    ) -> dict[str, Endpoints | None]:
        """Returns the endpoints of every actor, or of those named; None for one that does not answer in time."""
        return endpoints_of(self.actors() if names is None else names, self.name, timeout_s)

    def router_address(self) -> str:
        """Returns host:port of the first router, for moecluster.client.Client. Raises Unavailable."""
        routers = sorted(filter(is_router, self.actors()), key=number_of)
        return self._endpoints_of(routers[0] if routers else ROUTER).address  # it may have left its node to another one

    def router_addresses(self) -> tuple[str, ...]:
        """Returns host:port of every router that answers now. Raises Unavailable if none does."""
        found = self.endpoints(names=[name for name in self.actors() if is_router(name)])
        addresses = tuple(endpoints.address for endpoints in found.values() if endpoints is not None)
        if not addresses:
            raise Unavailable(f"no router of the cluster {self.name} answers; it may be starting again")
        return addresses

    def controller_address(self) -> str:
        """Returns host:port of the controller. Raises Unavailable."""
        return self._endpoints_of(CONTROLLER).address

    def credentials(self) -> ClusterCredentials:
        """Returns the cluster's secret, from its controller. Raises Unavailable."""
        found: ClusterCredentials = call(self._handle(CONTROLLER).credentials.remote(), CALL_TIMEOUT_S, CONTROLLER)
        return found

    def give_directory(self, directory: str) -> None:
        """Allows requests to the cluster to name this directory and everything below it. Raises Unavailable."""
        GivenDirectories(self.name).give(directory)

    def training(self, credentials: ClusterCredentials | None) -> TrainingRun:
        """Returns a client for training runs in the first router. Their paths must be given to the cluster first."""
        return TrainingRun(find_first=self.router_address, find_all=self.router_addresses, credentials=credentials)

    def stop(self) -> None:
        """Kills all actors of the namespace, and waits until they are gone."""
        end_actors(self.name, KILL_TIMEOUT_S)
        with suppress(Unavailable):  # the next cluster of this name forgets them when it starts
            GivenDirectories(self.name).forget_all()

    def _wait_ready(self, handles: Mapping[str, "ActorHandle[Any]"], timeout_s: float) -> dict[str, Endpoints]:
        """Waits by handle, not by name: an actor that cannot start loses its name, but its handle tells why."""
        deadline_s = time.monotonic() + timeout_s
        found: dict[str, Endpoints] = {}
        for name, handle in handles.items():
            left_s = max(deadline_s - time.monotonic(), 0.0)
            try:
                found[name] = call(handle.endpoints.remote(), left_s, name)
            except DeadlineExceeded as exc:
                raise ResourceError(
                    f"{name} was not started within {timeout_s:g} s; is the Ray cluster short of CPUs or memory? "
                    "(cluster.start_timeout_s says how long to wait)"
                ) from exc
            except Unavailable as exc:
                raise ResourceError(str(exc)) from exc
        return found

    def _wait_loaded(self, deadline_s: float, look: Callable[[], None]) -> None:
        """Waits until the first placement is published; calls look meanwhile, and once more afterwards."""
        left_s = max(deadline_s - time.monotonic(), 0.0)
        started: Any = self._handle(CONTROLLER).wait_started.remote(left_s)
        while not ray.wait([started], timeout=POLL_S)[0] and time.monotonic() < deadline_s:
            look()
        call(started, CALL_TIMEOUT_S, CONTROLLER)
        look()

    def _endpoints_of(self, name: str) -> Endpoints:
        endpoints: Endpoints = call(self._handle(name).endpoints.remote(), CALL_TIMEOUT_S, name)
        return endpoints

    def _handle(self, name: str) -> "ActorHandle[Any]":
        return find_actor(name, self.name)
