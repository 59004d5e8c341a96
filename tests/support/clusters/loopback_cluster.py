"""A whole cluster over real gRPC in one process: experts, controller and router, without Ray."""

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any, Self

from actors.controller_config import GRACE_LEASES
from moecluster.controller.controller import Controller
from moecluster.controller.operations.routers import RouterSupervisor
from moecluster.controller.operations.weight_rollout import UpdateSettings
from moecluster.controller.settings import ControllerSettings
from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.expert.service import ExpertService
from moecluster.metrics import Metrics
from moecluster.models.checkpoint.reader import OpenCheckpoint
from moecluster.models.experts.source import ExpertSource
from moecluster.models.given_directories import IsGiven
from moecluster.placement.initial import contiguous_placement
from moecluster.router.engine.engine import EngineLimits
from moecluster.router.router import Router
from moecluster.rpc.controller.server import serve_controller
from moecluster.rpc.controller.subscription import MAX_BACKOFF_S, ControllerClient
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.rpc.expert.server import serve_expert
from moecluster.rpc.health import HealthWatch
from moecluster.rpc.router.server import serve_router
from moecluster.rpc.server import RunningServer
from moecluster.types import ActorAddress, ProcessInfo, RouterState
from tests.support.clusters.given import any_directory

LEASE_S = 0.6


class LoopbackCluster:
    """num_actors expert actors, each of which can be killed and revived, a controller, and a router."""

    def __init__(
        self,
        directory: str,
        *,
        num_actors: int = 2,
        max_running: int = 4,
        max_waiting: int = 0,
        batch_invariant: bool = False,
        device: str = "cpu",
        router_supervisor: RouterSupervisor | None = None,
        open_elsewhere: OpenCheckpoint | None = None,
        is_given_to: Callable[[str], IsGiven] = lambda part: any_directory,
        announce: Callable[[str], None] = lambda checkpoint: None,
        **controller: Any,
    ) -> None:
        """device: of trunks. router_supervisor: starts more routers. open_elsewhere: opens checkpoints of other hosts.
        is_given_to: a part, which is "controller" or the name of an actor or router -> the directories that it may load
        weights from. announce: what the controller calls before it opens a checkpoint. controller: ControllerSettings
        fields that differ from start_controller's."""
        self._router_supervisor = router_supervisor
        self.told: RouterState | None = None  # reported to the controller for the router; None: its own state
        self._controller_settings = controller
        self._batch_invariant, self._device = batch_invariant, device
        self._open_elsewhere, self._is_given_to, self._announce = open_elsewhere, is_given_to, announce
        self.draining: set[str] = set()  # nodes; each actor is on a node of its own
        self.names = tuple(f"expert-{i}" for i in range(num_actors))
        self.services: dict[str, ExpertService] = {}
        self._processes: dict[str, ProcessInfo] = {}
        self.servers: dict[str, RunningServer] = {}
        for name in self.names:
            self.revive(name)
        self._directory = directory
        self.controller, self.controller_server = self.start_controller()
        self._limits = EngineLimits(max_running=max_running, max_waiting=max_waiting, max_cached_tokens=4096)
        self._first = self.add_router("router", told=lambda: self.told)
        self.router, self.router_server = self._first.router, self._first.server
        self.placements, self.remote, self.metrics = self._first.placements, self._first.remote, self._first.metrics

    def add_router(self, name: str, *, told: Callable[[], RouterState | None] = lambda: None) -> "LoopbackRouter":
        """Adds a router, which the caller closes. told: state to report to the controller; None: the router's own."""
        return LoopbackRouter(
            name,
            self._directory,
            controller=lambda: self.controller_server.address,
            limits=self._limits,
            batch_invariant=self._batch_invariant,
            device=self._device,
            open_elsewhere=self._open_elsewhere,
            is_given=self._is_given_to(name),
            told=told,
            metrics=(metrics := self.new_metrics()),
            process=self.show(name, metrics),
        )

    def new_metrics(self) -> Metrics:
        """Returns the metrics of a process."""
        return Metrics(model="tiny")

    def show(self, process: str, metrics: Metrics) -> ProcessInfo:
        """Called with the metrics of every process that starts. Returns where they are shown: nowhere."""
        return ProcessInfo()

    def start_controller(self) -> tuple[Controller, RunningServer]:
        layer_experts = {layer.layer: layer.num_experts for layer in ExpertSource(self._directory).layers}
        settings: dict[str, Any] = {
            "actors": self.names,
            "replicas": contiguous_placement(layer_experts, self.names),
            "layer_experts": layer_experts,
            "checkpoint": self._directory,
            "lease_s": LEASE_S,
            "health_period_s": 0.5,
            "start_timeout_s": 1.0,
            "update": UpdateSettings(router_grace_s=GRACE_LEASES * LEASE_S + MAX_BACKOFF_S),
        }
        metrics = self.new_metrics()
        controller = Controller(
            ControllerSettings(**(settings | self._controller_settings)),
            is_given=self._is_given_to("controller"),
            supervisor=self,
            connect=_control,
            watch=_watch,
            metrics=metrics,
            process=self.show("controller", metrics),
            routers=self._router_supervisor,
            announce=self._announce,
            open_elsewhere=self._open_elsewhere,
        )
        controller.start(20.0)
        return controller, serve_controller(controller, credentials=None)

    def replace_controller(self) -> None:
        """Closes the controller and starts another one at another address."""
        self.controller_server.stop(0.0)
        self.controller.close()
        self.controller, self.controller_server = self.start_controller()

    def kill(self, actor: str) -> None:
        self.servers.pop(actor).stop(0.0)
        self.services.pop(actor).close()

    def revive(self, actor: str) -> None:
        metrics = self.new_metrics()
        self._processes[actor] = self.show(actor, metrics)
        self.services[actor] = ExpertService(
            is_given=self._is_given_to(actor),
            name=actor,
            batch_invariant=self._batch_invariant,
            open_elsewhere=self._open_elsewhere,
            metrics=metrics,
        )
        self.servers[actor] = serve_expert(self.services[actor], credentials=None)

    def address_of(self, actor: str, timeout_s: float) -> ActorAddress | None:
        server = self.servers.get(actor)
        if server is None:
            return None
        incarnation = self.services[actor].incarnation
        return ActorAddress(
            actor=actor,
            address=server.address,
            incarnation=incarnation,
            node=f"node-of-{actor}",
            process=self._processes[actor],
        )

    def restart(self, actor: str) -> None:
        self.kill(actor)
        self.revive(actor)

    def known(self) -> tuple[str, ...]:
        return tuple(self.services)

    def create(self, actor: str, *, avoid_nodes: Collection[str] = ()) -> None:
        if actor not in self.services:
            self.revive(actor)

    def remove(self, actor: str) -> None:
        if actor in self.services:
            self.kill(actor)

    def draining_nodes(self) -> frozenset[str]:
        return frozenset(self.draining)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._first.close()
        self.controller.close()
        self.controller_server.stop(0.0)
        for name in list(self.servers):
            self.kill(name)


class LoopbackRouter:
    """A router, its server, and its connection to the controller."""

    def __init__(
        self,
        name: str,
        directory: str,
        *,
        controller: Callable[[], str],
        limits: EngineLimits,
        batch_invariant: bool,
        device: str,
        open_elsewhere: OpenCheckpoint | None,
        is_given: IsGiven,
        told: Callable[[], RouterState | None],
        metrics: Metrics,
        process: ProcessInfo,
    ) -> None:
        """controller: returns its current address. told: see LoopbackCluster.add_router."""
        self._own_state = lambda: RouterState(router=name)
        self.placements = ControllerClient(router=name, resolve=controller, state=lambda: told() or self._own_state())
        self.metrics = metrics
        pool = ExpertPool(self.placements, connect=partial(_connect, router=name), control=_control)
        self.remote = RemoteExperts(pool, timeout_s=20.0, batch_invariant=batch_invariant, metrics=self.metrics)
        self.router = Router(
            directory,
            self.remote,
            is_given=is_given,
            limits=limits,
            name=name,
            device=device,
            metrics=self.metrics,
            on_change=self.placements.renew,
            open_elsewhere=open_elsewhere,
        )
        self._own_state = lambda: replace(self.router.state(), process=process)
        self.server = serve_router(self.router, credentials=None)

    def close(self) -> None:
        """Closes the router, its server first: clients notice as in a crash. Idempotent."""
        self.server.stop(0.0)
        self.placements.close()
        self.router.close()


def _connect(address: ActorAddress, *, router: str) -> GrpcExpertTransport:
    return GrpcExpertTransport(address, router=router, shared_memory_bytes=2**20)


def _control(address: ActorAddress) -> GrpcExpertControl:
    return GrpcExpertControl(address.actor, address.address, timeout_s=5.0)


def _watch(address: ActorAddress, on_lost: Callable[[], None]) -> HealthWatch:
    return HealthWatch(address.address, on_lost)
