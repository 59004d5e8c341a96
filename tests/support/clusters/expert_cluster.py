"""Expert services in this process behind any transport: a cluster for unit and rpc tests, without Ray."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import Unavailable
from moecluster.expert.service import ExpertService
from moecluster.metrics import Metrics
from moecluster.models.experts.source import ExpertSource
from moecluster.placement.initial import contiguous_placement
from moecluster.rpc.controller.in_process import FixedPlacement
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.rpc.expert.in_process import InProcessTransport
from moecluster.rpc.expert.interface import ControlConnection, ExpertTransport
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.rpc.expert.server import serve_expert
from moecluster.rpc.server import RunningServer
from moecluster.types import ActorAddress, OptimizerSettings, Placement, Replica
from tests.support.clusters.given import any_directory

Transport = Literal["in-process", "inline", "shm"]
SHARED_MEMORY_BYTES = 4 * 2**20


class ExpertCluster:
    """num_actors expert services that hold a checkpoint's experts, and RemoteExperts that reach them."""

    def __init__(
        self,
        directory: str | Path,
        *,
        num_actors: int = 2,
        transport: Transport = "in-process",
        replicas: tuple[Replica, ...] | None = None,
        batch_invariant: bool = False,
        optimizer: OptimizerSettings | None = None,
        activation_budget_bytes: int = 64 * 2**20,
        timeout_s: float = 20.0,
        dtype: str = "",
        metrics_of: Callable[[str], Metrics | None] = lambda process: None,
    ) -> None:
        """metrics_of: an actor's name, or "router" -> its metrics; None: it has none."""
        self.directory = directory
        self._transport = transport
        layer_experts = {layer.layer: layer.num_experts for layer in ExpertSource(directory).layers}
        names = [f"expert-{i}" for i in range(num_actors)]
        replicas = replicas or contiguous_placement(layer_experts, names)
        self.services = {
            name: ExpertService(
                is_given=any_directory,
                name=name,
                batch_invariant=batch_invariant,
                activation_budget_bytes=activation_budget_bytes,
                metrics=metrics_of(name),
            )
            for name in names
        }
        self.servers: dict[str, RunningServer] = {}
        if transport != "in-process":
            self.servers = {name: serve_expert(service, credentials=None) for name, service in self.services.items()}
        addresses = {
            name: ActorAddress(
                actor=name,
                address=self.servers[name].address if self.servers else "",
                incarnation=service.incarnation,
            )
            for name, service in self.services.items()
        }
        self.placement = Placement(
            term=1, generation=1, layer_experts=layer_experts, actors=addresses, replicas=replicas
        )
        for name, service in self.services.items():
            service.load(
                LoadRequest(
                    term=1,
                    experts=self.placement.experts_on(name),
                    checkpoint=str(directory),
                    dtype=dtype,
                    optimizer=optimizer,
                    training_term=1 if optimizer else 0,
                )
            )
            service.set_placement(PlacementNotice(term=1, generation=1))
        self.placements = FixedPlacement(self.placement)
        self.pool = ExpertPool(self.placements, connect=self.connect, control=self.control)
        self.remote = RemoteExperts(
            self.pool, timeout_s=timeout_s, batch_invariant=batch_invariant, metrics=metrics_of("router")
        )

    def connect(self, address: ActorAddress) -> ExpertTransport:
        """Opens the transport to an actor."""
        if self._transport == "in-process":
            return InProcessTransport(self.services[address.actor])
        shared_memory_bytes = SHARED_MEMORY_BYTES if self._transport == "shm" else 0
        transport = GrpcExpertTransport(address, router="test", shared_memory_bytes=shared_memory_bytes)
        if transport.name != self._transport:
            raise Unavailable(f"the handshake chose {transport.name}, the test wants {self._transport}")
        return transport

    def control(self, address: ActorAddress) -> ControlConnection:
        """Opens the control connection to an actor."""
        if self._transport == "in-process":
            return control_of(self.services[address.actor])
        return GrpcExpertControl(address.actor, address.address)

    def close(self) -> None:
        self.remote.close()
        for server in self.servers.values():
            server.stop(0.1)
        for service in self.services.values():
            service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def control_of(service: ExpertService) -> ControlConnection:
    """Returns a ControlConnection that calls a service of this process directly."""
    return cast(ControlConnection, _Control(service))


class _Control:
    def __init__(self, service: ExpertService) -> None:
        self._service = service
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)

    def close(self) -> None:
        """Does not close the service."""
        self.closed = True
