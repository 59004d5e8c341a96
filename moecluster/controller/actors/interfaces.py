"""How expert actors are started and watched, and what the actor monitors share with the rest of the controller."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.errors import MoeClusterError, StaleRequest
from moecluster.types import ActorAddress, ExpertActorStatus, ExpertId, WeightVersion


class ActorSupervisor(Protocol):
    """What starts expert actors, and starts them again when they die."""

    def address_of(self, actor: str, timeout_s: float) -> ActorAddress | None:
        """Where the actor listens now; waits while it is started again. None after the timeout."""

    def restart(self, actor: str) -> None:
        """Ends a process that hangs, so that a new one takes its place. Never raises."""

    def known(self) -> tuple[str, ...]:
        """The expert actors that are there, or are being started."""

    def create(self, actor: str, *, avoid_nodes: Collection[str] = ()) -> None:
        """Asks for a new actor; it comes when there is room for it. Fine if it is there already."""

    def remove(self, actor: str) -> None:
        """Ends an actor for good. Fine if it is gone already."""

    def draining_nodes(self) -> frozenset[str]:
        """Nodes that will be taken away soon."""


class IncarnationWatch(Protocol):
    """Looks out for the end of one incarnation of an actor."""

    def close(self) -> None:
        """Ends the watch."""


Watch = Callable[[ActorAddress, Callable[[], None]], IncarnationWatch]


@dataclass(frozen=True, kw_only=True)
class DesiredState:
    """What stands now, as actors are told it."""

    term: int
    generation: int
    versions: WeightVersions
    dtype: str  # empty: the checkpoint's
    snapshot: bytes = b""  # what the controller leaves with its actors for its successor


class MonitorOwner(Protocol):
    """The controller, as a monitor sees it."""

    def desired_state(self) -> DesiredState:
        """What stands now."""

    def assigned(self, actor: str) -> frozenset[ExpertId]:
        """What the actor shall hold."""

    def kept(self, actor: str) -> frozenset[ExpertId]:
        """What the actor may hold: what it shall, and what is being loaded there to stand later."""

    def lost(self) -> frozenset[ExpertId]:
        """Experts that nobody serves: they are loaded first."""

    def settled(self) -> bool:
        """Whether routers had the time to take a placement of this controller: what it leaves out may be unloaded."""

    def actor_up(
        self,
        address: ActorAddress,
        held: Collection[ExpertId],
        *,
        versions: tuple[WeightVersion, ...],
        complete: bool,
    ) -> None:
        """The actor serves these experts in these versions; complete: all that it shall hold."""

    def actor_prepared(
        self, address: ActorAddress, version: int, experts: Collection[ExpertId], *, loaded_bytes: int
    ) -> None:
        """The actor holds these experts in the version that is next; loaded_bytes: since the last time."""

    def preparing_failed(self, actor: str, version: int, error: MoeClusterError) -> None:
        """The actor cannot load the version that is next now; the monitor goes on trying."""

    def to_reload(self, actor: str) -> frozenset[ExpertId]:
        """What is to be loaded anew while the actor serves: it answers NaN or infinity."""

    def reloaded(self, actor: str, experts: Collection[ExpertId], loaded_bytes: int) -> None:
        """That was done."""

    def reload_failed(self, actor: str, experts: Collection[ExpertId], error: MoeClusterError) -> None:
        """It cannot be done."""

    def actor_loaded(self, actor: str, loaded_bytes: int) -> None:
        """The actor has loaded experts after its start."""

    def actor_reports(self, address: ActorAddress, status: ExpertActorStatus) -> None:
        """The actor answered a look."""

    def actor_down(self, actor: str) -> None:
        """The actor that was up is lost."""

    def actor_failed(self, actor: str, error: MoeClusterError) -> None:
        """The actor cannot be brought up now; the monitor goes on trying."""

    def deposed(self, error: StaleRequest) -> None:
        """An actor has seen a higher term: another controller has taken over."""
