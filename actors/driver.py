"""Starts, finds and stops a cluster: its named, detached actors in a Ray namespace of its own."""

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from actors.ray_calls import call, endpoints_of, find_actor, named_actors
from actors.router_actor import RouterActor
from actors.spawn import spawn
from moecluster.config import Config
from moecluster.errors import DeadlineExceeded, ResourceError, Unavailable
from moecluster.models.experts.source import ExpertSource
from moecluster.placement.initial import initial_placement
from moecluster.placement.policy.registry import policy_named
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.exposure import refuse_plain_text
from moecluster.training.checkpoint_store import CHECKPOINTS

if TYPE_CHECKING:
    from actors.training_host import Progress  # imports transformers, which takes seconds

CALL_TIMEOUT_S = 10.0
PROGRESS_TIMEOUT_S = 60.0  # the router's process also computes
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
        Raises UserError if the model, placement, resources or ports do not fit, or if others could listen in; then
        everything started is stopped.
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
        check_resources(config, ray.available_resources())
        check_ports(config)
        refuse_plain_text([config.cluster.host], config.security)
        tls_dir = config.security.tls_dir and os.path.abspath(config.security.tls_dir)
        credentials = replace(credentials, cluster=self.name, tls_dir=tls_dir)
        given = GivenDirectories(self.name)
        given.forget_all()  # left over from a cluster of this name that was not taken down
        try:
            given.give(model_dir)
            ports = metrics_ports(config)
            tables = config.to_tables()
            handles = {
                name: spawn(ExpertActor, "expert", config, name, tables, credentials, name, ports[name])
                for name in names
            }
            handles[CONTROLLER] = spawn(
                ControllerActor, "controller", config, CONTROLLER,
                tables, credentials, model_dir, replicas, layer_experts, ports[CONTROLLER],
            )  # fmt: skip
            if has_other_nodes(config):
                node = ray.get_runtime_context().get_node_id()
                handles[SOURCE] = spawn(
                    CheckpointSource, "source", config, SOURCE, model_dir, credentials, config.cluster.host, node=node
                )
            for name in router_names(config):
                handles[name] = spawn(
                    RouterActor, "router", config, name, tables, credentials, name, model_dir, ports[name]
                )
            deadline_s = time.monotonic() + config.cluster.start_timeout_s
            endpoints = self._wait_ready(handles, config.cluster.start_timeout_s)
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
        return self._endpoints_of(ROUTER).address

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

    def reload_routers(self, model_dir: str, timeout_s: float = 120.0) -> None:
        """Makes every router load trunk and tokenizer from a directory that the controller knows already."""
        self.give_directory(model_dir)
        routers = [name for name in self.actors() if is_router(name)]
        asked: dict[str, Any] = {name: self._handle(name).reload.remote(model_dir) for name in routers}
        for name, reference in asked.items():
            # A router that is being restarted loads the directory that the controller names.
            with suppress(Unavailable):
                call(reference, timeout_s, name)

    def train(self, config: Config, start: str) -> None:
        """Starts a training run in the first router. Raises UserError if one is in progress."""
        for directory in (start, Path(config.train.output_dir) / CHECKPOINTS):
            self.give_directory(str(directory))
        call(self._handle(ROUTER).train.remote(config.to_tables(), start), CALL_TIMEOUT_S, ROUTER)

    def training_progress(self, since: int) -> "Progress":
        """Returns the run's events from number `since` on, and whether it has ended."""
        progress: Progress = call(self._handle(ROUTER).training_progress.remote(since), PROGRESS_TIMEOUT_S, ROUTER)
        return progress

    def stop_training(self) -> None:
        """Ends the run after its current event."""
        call(self._handle(ROUTER).stop_training.remote(), CALL_TIMEOUT_S, ROUTER)

    def stop(self) -> None:
        """Kills all actors of the namespace, and waits until they are gone."""
        deadline_s = time.monotonic() + KILL_TIMEOUT_S
        # In a loop: the controller may have requested another actor just before it died.
        while (names := self.actors()) and time.monotonic() < deadline_s:
            for name in sorted(names, key=_stop_order):
                with suppress(Unavailable):  # gone meanwhile
                    ray.kill(self._handle(name), no_restart=True)
            time.sleep(POLL_S)
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


def check_resources(config: Config, available: Mapping[str, float]) -> None:
    """Raises ResourceError naming the missing CPUs or GPUs. available: Ray's free resources, by Ray's names."""
    cluster = config.cluster
    needed = {
        "CPU": cluster.num_expert_actors * cluster.cpus_per_expert_actor
        + cluster.num_routers * cluster.cpus_per_router,
        "GPU": cluster.num_expert_actors * cluster.gpus_per_expert_actor
        + cluster.num_routers * cluster.gpus_per_router,
    }
    missing = {kind: count - available.get(kind, 0.0) for kind, count in needed.items()}
    short = [f"{count:g} {kind}s" for kind, count in missing.items() if count > 1e-6]
    if short:
        free = ", ".join(f"{available.get(kind, 0.0):g} {kind}s" for kind, count in needed.items() if count)
        routers = "the router" if cluster.num_routers == 1 else f"{cluster.num_routers} routers"
        raise ResourceError(
            f"{' and '.join(short)} are missing: {cluster.num_expert_actors} expert actors and {routers} need "
            f"{', '.join(f'{count:g} {kind}s' for kind, count in needed.items() if count)}, free are {free}; "
            "lower cluster.num_expert_actors, cluster.num_routers or the CPUs and GPUs per actor, or add nodes"
        )


def has_other_nodes(config: Config) -> bool:
    """Returns whether actors may run on nodes without the checkpoint: a Ray given by address may grow nodes."""
    return bool(config.cluster.address) or len([node for node in ray.nodes() if node["Alive"]]) > 1


def check_ports(config: Config) -> None:
    """Raises ResourceError if a port that the settings name is in use here."""
    for name, port in metrics_ports(config).items():
        if not port:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.cluster.host, port))
            except OSError as exc:
                raise ResourceError(
                    f"port {port} of {config.cluster.host} is in use, and {name}'s /metrics wants it; "
                    "choose another cluster.metrics_port, or 0 for any"
                ) from exc


def _stop_order(name: str) -> int:
    """Sorts the controller first, so that it does not restore what is being taken down."""
    return 0 if name == CONTROLLER else 1
