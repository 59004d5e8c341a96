"""Carries out queued operations: scale, drain, place and activate."""

from collections.abc import Callable, Collection, Mapping

from moecluster.controller.context import ControllerContext
from moecluster.controller.operations.expert_actors import Sizing
from moecluster.controller.rebalance.apply import PlacementApplier
from moecluster.controller.rebalance.decide import Planner
from moecluster.errors import ResourceError
from moecluster.placement.departures import number_of
from moecluster.placement.expert_ids import parse_expert
from moecluster.types import ExpertId, Operation, OperationKind, Replica


class OperationExecutor:
    """Used by one thread at a time. Every operation may be repeated: what is done already is left alone."""

    def __init__(
        self,
        context: ControllerContext,
        *,
        planner: Planner,
        applier: PlacementApplier,
        sizing: Sizing,
        removed_nodes: Callable[[], frozenset[str]],
    ) -> None:
        """removed_nodes: returns the nodes that are about to be removed."""
        self._cluster_state = context.state
        self._log = context.operations
        self._planner = planner
        self._applier = applier
        self._sizing = sizing
        self._removed_nodes = removed_nodes
        self._steps: Mapping[OperationKind, Callable[[Operation], None]] = {
            OperationKind.SCALE: self._scale,
            OperationKind.DRAIN: self._drain,
            OperationKind.PLACE: self._place,
            OperationKind.ACTIVATE: self._activate,
        }

    @property
    def kinds(self) -> frozenset[OperationKind]:
        """The kinds of operations that are carried out here."""
        return frozenset(self._steps)

    def carry_out(self, operation: Operation) -> None:
        """Raises Interrupted if it gave way to a recovery, Unavailable if an actor is not up (yet), another
        MoeClusterError if it failed."""
        self._steps[operation.kind](operation)

    def take_back(self, operation: Operation) -> None:
        """Undoes what a failed operation began: leaving actors stay, and actors that never came up are removed."""
        if operation.kind.waits_for_actors:
            self._cluster_state.set_leaving(())
            self._sizing.give_up_missing()

    def _scale(self, operation: Operation) -> None:
        """Scales to a number of actors: starts and fills new ones, or empties and removes some, node by node."""
        wanted = int(operation.arguments[0])
        self._sizing.check_size(wanted, OperationKind.SCALE)
        staying = self._sizing.staying()
        if wanted < len(staying):
            chosen = self._sizing.choose_leaving(len(staying) - wanted)
            self._cluster_state.set_leaving({*self._cluster_state.leaving, *chosen})
        elif wanted > len(staying):
            self._sizing.add(self._sizing.new_names(wanted - len(staying)))
        if not self._cluster_state.leaving:
            self._sizing.check_up(self._sizing.staying())
            self._fill(operation.id)
        self._empty_leaving(operation.id)

    def _drain(self, operation: Operation) -> None:
        """Empties and removes the actors of a node, or one actor; first starts others elsewhere if slots are short.

        Actors on other nodes that are about to be removed leave, too: they could take over nothing for long."""
        target, up = operation.arguments[0], self._cluster_state.up()
        nodes = self._removed_nodes() | {target}
        drained = [a for a in self._cluster_state.actors if a == target or (a in up and up[a].address.node in nodes)]
        # An actor that was lost with its node since an earlier attempt is on no node any longer, and still leaves.
        leaving = {*self._cluster_state.leaving, *drained}
        if not leaving:
            return  # done before
        self._cluster_state.set_leaving(leaving)
        missing = self._sizing.needed - len(self._sizing.staying())
        if missing > 0:
            self._sizing.add(self._sizing.new_names(missing), avoid_nodes=nodes)
        self._empty_leaving(operation.id)
        self._log.update(operation.id, detail=self._not_moved(operation, leaving))

    def _not_moved(self, operation: Operation, leaving: Collection[str]) -> str:
        """Returns what a drain could not move before its node was gone; empty if nothing."""
        lost = sorted(
            o.reason
            for o in self._log.newest()
            if o.kind is OperationKind.RESTORE and o.created_s >= operation.created_s and {*o.arguments} & {*leaving}
        )
        return f"not moved in time: {'; '.join(lost)}" if lost else ""

    def _place(self, operation: Operation) -> None:
        """Puts an expert on exactly these actors, with equal shares; none: it is cold until a token needs it."""
        expert, actors = parse_expert(operation.arguments[0], operation.kind), operation.arguments[1:]
        others = [r for r in self._cluster_state.replicas_of(expert.layer) if r.expert != expert]
        self._check_room(expert, actors, others)
        placed = [Replica(expert=expert, actor=actor, share=1 / len(actors)) for actor in actors]
        target = {expert.layer: tuple(sorted((*others, *placed), key=lambda r: (r.expert, r.actor)))}
        self._applier.apply(operation.id, target, exactly=[expert])

    def _check_room(self, expert: ExpertId, actors: Collection[str], others: list[Replica]) -> None:
        up = self._cluster_state.up()
        for actor in actors:
            if actor not in up or actor in self._cluster_state.leaving:
                raise ResourceError(f"place {expert}: {actor} serves no experts now; {', '.join(sorted(up))} do")
            taken = sum(r.actor == actor for r in others)
            if taken >= self._planner.observer.settings.slots_per_layer:
                raise ResourceError(
                    f"place {expert}: all {taken} slots of layer {expert.layer} on {actor} are taken; "
                    "name another actor, or raise controller.slots_per_layer"
                )

    def _activate(self, operation: Operation) -> None:
        """Loads cold experts that tokens need, each on the actor with the fewest replicas of its layer."""
        for expert in experts_of(operation):
            if expert not in self._cluster_state.cold:
                continue
            replicas = self._cluster_state.replicas_of(expert.layer)
            taken = {a: 0 for a in self._cluster_state.up() if a not in self._cluster_state.leaving}
            for r in replicas:
                if r.actor in taken:
                    taken[r.actor] += 1
            if not taken:
                raise ResourceError(f"expert {expert} cannot be loaded: no expert actor is up")
            actor = min(taken, key=lambda a: (taken[a], number_of(a)))
            placed = (*replicas, Replica(expert=expert, actor=actor))
            self._applier.apply(
                operation.id, {expert.layer: tuple(sorted(placed, key=lambda r: (r.expert, r.actor)))}, urgent=True
            )

    def _fill(self, operation_id: str) -> None:
        """Spreads the experts over all actors that stay."""
        change = self._planner.fill()
        self._log.update(
            operation_id,
            balancedness_before=change.decision.balancedness_before,
            balancedness_predicted=change.decision.balancedness_after,
        )
        self._applier.apply(operation_id, change.target)

    def _empty_leaving(self, operation_id: str) -> None:
        """Moves everything off the leaving actors, then removes them."""
        leaving = sorted(self._cluster_state.leaving)
        if not leaving:
            return
        self._sizing.check_size(len(self._sizing.staying()), OperationKind.DRAIN)
        self._log.update(operation_id, detail=f"emptying {', '.join(leaving)}")
        self._fill(operation_id)
        left = [
            str(r.expert)
            for r in self._cluster_state.replicas()
            if r.actor in leaving and r.actor in self._cluster_state.up()
        ]
        if left:
            raise ResourceError(f"{', '.join(leaving)} still hold {len(left)} experts ({left[0]}, ...)")
        self._sizing.remove(leaving)


def experts_of(operation: Operation) -> tuple[ExpertId, ...]:
    """Returns the experts of an operation whose arguments are all experts."""
    return tuple(parse_expert(argument, operation.kind) for argument in operation.arguments)
