"""Interfaces of the actor monitors: to what starts and watches expert actors, and to the rest of the controller."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.errors import MoeClusterError, StaleRequest
from moecluster.types import ActorAddress, ExpertActorStatus, ExpertId, WeightVersion


class ActorSupervisor(Protocol):
    """Starts expert actors, and restarts them when they die.

    What it says of the cluster is complete and of now, or it raises Unavailable: no answer is not an empty one.
    """

    def address_of(self, actor: str, timeout_s: float) -> ActorAddress | None:
        """Returns the actor's current address, waiting while it restarts. None after the timeout."""

    def restart(self, actor: str) -> None:
        """Ends a hung process, so that a new one replaces it. Never raises."""

    def known(self) -> tuple[str, ...]:
        """The expert actors that exist or are being started. Raises Unavailable."""

    def create(self, actor: str, *, avoid_nodes: Collection[str] = ()) -> None:
        """Requests a new actor, which starts once the cluster has room for it. Does nothing if it exists. Raises
        Unavailable."""

    def remove(self, actor: str) -> None:
        """Ends an actor for good. Does nothing if it is gone. Never raises: the request may be lost."""

    def draining_nodes(self) -> Mapping[str, float]:
        """Nodes that are about to be removed, and in how many seconds (inf: unknown). Raises Unavailable."""

    def shared_nodes(self) -> frozenset[str]:
        """Nodes that hold the controller or a router. Raises Unavailable."""


class IncarnationWatch(Protocol):
    """Watches for the end of one incarnation of an actor."""

    def close(self) -> None:
        """Ends the watch."""


Watch = Callable[[ActorAddress, Callable[[], None]], IncarnationWatch]


@dataclass(frozen=True, kw_only=True)
class DesiredState:
    """The current state, as it is sent to actors."""

    term: int
    generation: int
    versions: WeightVersions
    dtype: str  # empty: the checkpoint's
    snapshot: bytes = b""  # the controller's snapshot, which actors keep for its successor


class MonitorOwner(Protocol):
    """Interface between an actor monitor and the controller: desired state in, events out."""

    def desired_state(self) -> DesiredState:
        """Returns the state to send to actors."""

    def assigned(self, actor: str) -> frozenset[ExpertId]:
        """The experts that the actor should hold."""

    def kept(self, actor: str) -> frozenset[ExpertId]:
        """The experts that the actor may hold: those assigned to it, and those that it is about to load."""

    def lost(self) -> frozenset[ExpertId]:
        """Experts that no actor serves: they are loaded first."""

    def settled(self) -> bool:
        """Whether routers had the time to apply a placement of this controller, so that surplus may be unloaded."""

    def actor_up(
        self,
        address: ActorAddress,
        held: Collection[ExpertId],
        *,
        versions: tuple[WeightVersion, ...],
        complete: bool,
    ) -> None:
        """The actor serves these experts in these versions; complete: all that it should hold."""

    def actor_prepared(
        self, address: ActorAddress, version: int, experts: Collection[ExpertId], *, loaded_bytes: int
    ) -> None:
        """The actor holds these experts in the next version; loaded_bytes: since the last call."""

    def preparing_failed(self, actor: str, version: int, error: MoeClusterError) -> None:
        """The actor cannot load the next version now; the monitor keeps trying."""

    def to_reload(self, actor: str) -> frozenset[ExpertId]:
        """The experts to reload while the actor serves, since they returned NaN or infinity."""

    def reloaded(self, actor: str, experts: Collection[ExpertId], loaded_bytes: int) -> None:
        """The actor has reloaded these experts."""

    def reload_failed(self, actor: str, experts: Collection[ExpertId], error: MoeClusterError) -> None:
        """The actor cannot reload these experts."""

    def actor_loaded(self, actor: str, loaded_bytes: int) -> None:
        """The actor has loaded experts after its start."""

    def actor_reports(self, address: ActorAddress, status: ExpertActorStatus) -> None:
        """The actor answered a health check."""

    def actor_down(self, actor: str) -> None:
        """The actor is lost, or failed while loading."""

    def actor_failed(self, actor: str, error: MoeClusterError) -> None:
        """The actor cannot be brought up now; the monitor keeps trying."""

    def deposed(self, error: StaleRequest) -> None:
        """An actor has seen a higher term: another controller has taken over."""
