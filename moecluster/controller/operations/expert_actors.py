"""Changes the number of expert actors: requests actors, and removes empty ones. Each step may be repeated."""

import logging
from collections.abc import Collection, Iterable

from moecluster.controller.actors.interfaces import ActorSupervisor
from moecluster.controller.actors.manager import ActorManager
from moecluster.controller.context import ControllerContext
from moecluster.errors import MoeClusterError, ResourceError, Unavailable
from moecluster.placement.departures import choose_leaving, number_of

logger = logging.getLogger(__name__)


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

    def choose_leaving(self, count: int) -> tuple[str, ...]:
        """Returns the staying actors that leave if the cluster shrinks by `count`: those that never came up, then those
        whose departure frees whole nodes."""
        staying, up = self.staying(), self._cluster_state.up()
        absent = [a for a in reversed(staying) if a not in up and not self._cluster_state.assigned(a)][:count]
        try:
            shared_nodes = self._supervisor.shared_nodes()
        except MoeClusterError as exc:
            logger.info("actors leave by number, not by node: %s", exc)
            shared_nodes = frozenset()
        others = choose_leaving(
            [a for a in staying if a not in absent],
            count - len(absent),
            nodes={a: up[a].address.node for a in staying if a in up},
            shared_nodes=shared_nodes,
        )
        return (*absent, *others)

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
