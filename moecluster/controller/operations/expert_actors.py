"""Changes the number of expert actors: requests actors, and removes empty ones. Each step may be repeated."""

import re
from collections.abc import Collection, Iterable

from moecluster.controller.actors.interfaces import ActorSupervisor
from moecluster.controller.actors.manager import ActorManager
from moecluster.controller.context import ControllerContext
from moecluster.errors import ResourceError, Unavailable


class Sizing:
    """Used by one thread at a time. Filling and emptying actors is the work of the policy and the PlacementApplier."""

    def __init__(
        self,
        context: ControllerContext,
        *,
        supervisor: ActorSupervisor,
        actor_manager: ActorManager,
        slots_per_layer: int,
    ) -> None:
        self._cluster_state = context.state
        self._supervisor = supervisor
        self._monitors = actor_manager
        self._slots_per_layer = slots_per_layer

    @property
    def needed(self) -> int:
        """The fewest actors whose slots hold every expert."""
        return -(-max(self._cluster_state.layer_experts.values()) // self._slots_per_layer)

    def check_size(self, actors: int, what: str) -> None:
        """Raises ResourceError if this number of actors has too few slots for the experts."""
        most = max(self._cluster_state.layer_experts.values())
        missing = most - actors * self._slots_per_layer
        if missing > 0:
            raise ResourceError(
                f"{what}: {actors} expert actors of {self._slots_per_layer} slots for each layer are {missing} slots "
                f"short of its {most} experts; {self.needed} actors are the fewest (controller.slots_per_layer)"
            )

    def staying(self) -> tuple[str, ...]:
        """The actors that are not leaving, sorted by number."""
        return tuple(
            sorted((a for a in self._cluster_state.actors if a not in self._cluster_state.leaving), key=number_of)
        )

    def add(self, actors: Iterable[str], *, avoid_nodes: Collection[str] = ()) -> None:
        """Requests actors, and starts monitoring them."""
        for actor in actors:
            self._cluster_state.add_actor(actor)
            self._supervisor.create(actor, avoid_nodes=avoid_nodes)
            self._monitors.keep(actor)

    def new_names(self, count: int) -> list[str]:
        """Returns names with the lowest free numbers."""
        taken = set(self._cluster_state.actors)
        return [name for n in range(len(taken) + count) if (name := f"expert-{n}") not in taken][:count]

    def check_up(self, actors: Collection[str]) -> None:
        """Raises Unavailable, naming the actors that do not serve yet, if there are any."""
        if missing := sorted(set(actors) - self._cluster_state.up().keys(), key=number_of):
            raise Unavailable(
                f"{', '.join(missing)} {'does' if len(missing) == 1 else 'do'} not serve yet; "
                "is the Ray cluster short of CPUs, GPUs or memory?"
            )

    def give_up_missing(self) -> None:
        """Removes the actors that are not up and have no experts assigned."""
        up = self._cluster_state.up()
        self.remove([a for a in self._cluster_state.actors if a not in up and not self._cluster_state.assigned(a)])

    def remove(self, actors: Iterable[str]) -> None:
        """Removes actors that hold nothing needed any longer."""
        for actor in actors:
            self._monitors.let_go(actor)
            self._cluster_state.remove_actor(actor)
            self._supervisor.remove(actor)


def number_of(actor: str) -> tuple[int, str]:
    """Sorts actors by the number in their names."""
    digits = re.search(r"(\d+)$", actor)
    return (int(digits.group()) if digits else 0, actor)
