"""What the keepers of actors are told of the cluster, and whom they tell."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from moecluster.errors import MoeClusterError, StaleOrder
from moecluster.roles.standing_versions import StandingVersions
from moecluster.types import ActorAddress, ExpertActorStatus, ExpertId, WeightVersion


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What stands now, as actors are told it."""

    term: int
    generation: int
    versions: StandingVersions
    dtype: str  # empty: the checkpoint's
    picture: bytes = b""  # what the controller leaves with its actors for its successor


class KeeperOwner(Protocol):
    """The controller, as a keeper sees it."""

    def orders(self) -> Orders:
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
        """The actor cannot load the version that is next now; the keeper goes on trying."""

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
        """The actor cannot be brought up now; the keeper goes on trying."""

    def deposed(self, error: StaleOrder) -> None:
        """An actor has seen a higher term: another controller has taken over."""
