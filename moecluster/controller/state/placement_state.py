"""The current state as data, and the placement published from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.placement.names import with_whole_shares
from moecluster.types import ActorAddress, ExpertId, Placement, PlacementNumber, Replica, WeightVersion


@dataclass(frozen=True, kw_only=True)
class UpActor:
    """An actor that serves."""

    address: ActorAddress
    held: frozenset[ExpertId]  # in every weight version in use
    prepared: frozenset[ExpertId] = frozenset()  # in the next version


@dataclass(kw_only=True)
class PlacementState:
    """Not thread-safe."""

    term: int = 0
    generation: int = 0
    versions: WeightVersions = field(
        default_factory=lambda: WeightVersions.only(WeightVersion(version=1, checkpoint=""))
    )
    held: bool = False
    actors: tuple[str, ...] = ()
    leaving: frozenset[str] = frozenset()
    replicas: dict[int, tuple[Replica, ...]] = field(default_factory=dict)  # layer -> assigned replicas
    cold: frozenset[ExpertId] = frozenset()  # without a replica on purpose
    preparing: dict[str, frozenset[ExpertId]] = field(default_factory=dict)  # being loaded, not assigned yet
    up: dict[str, UpActor] = field(default_factory=dict)
    aside: frozenset[tuple[str, ExpertId]] = frozenset()  # replicas that returned NaN or infinity
    problems: dict[str, str] = field(default_factory=dict)  # actor -> why it cannot load its experts

    @property
    def number(self) -> PlacementNumber:
        return PlacementNumber(self.term, self.generation)

    def all_replicas(self) -> tuple[Replica, ...]:
        """All assigned replicas, by layer."""
        return tuple(r for layer in sorted(self.replicas) for r in self.replicas[layer])

    def serves(self, replica: Replica) -> bool:
        """Whether its actor is up and holds the expert. A replica that is set aside serves only if there is no other
        one of its expert."""
        if not self._is_held(replica):
            return False
        return (replica.actor, replica.expert) not in self.aside or not any(
            self._is_held(other) and (other.actor, other.expert) not in self.aside
            for other in self.replicas[replica.expert.layer]
            if other.expert == replica.expert
        )

    def _is_held(self, replica: Replica) -> bool:
        up = self.up.get(replica.actor)
        return up is not None and replica.expert in up.held

    def placement(self, layer_experts: Mapping[int, int]) -> Placement:
        """Returns the placement for routers: the replicas that serve, and the weight versions."""
        following = self.versions.next
        return Placement(
            term=self.term,
            generation=self.generation,
            layer_experts=layer_experts,
            actors={actor: up.address for actor, up in sorted(self.up.items())},
            replicas=with_whole_shares(tuple(r for r in self.all_replicas() if self.serves(r))),
            held=self.held,
            weight_version=self.versions.weight_version,
            checkpoint=self.versions.checkpoint,
            next_weight_version=following.version if following is not None else 0,
            next_checkpoint=following.checkpoint if following is not None else "",
            old_weight_version=self.versions.old,
            problem=self._problem_of_lost(),
        )

    def _problem_of_lost(self) -> str:
        """Returns why lost experts cannot be loaded; empty if there are none, or an actor may still load some."""
        replicas = self.all_replicas()
        served = {r.expert for r in replicas if self.serves(r)}
        awaited = {r.actor for r in replicas if r.expert not in served}
        return self.problems[min(awaited)] if awaited and awaited <= self.problems.keys() else ""
