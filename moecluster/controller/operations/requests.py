"""Operation requests of users and routers: checked here, then queued for the reconciler."""

import os
from collections.abc import Callable, Collection, Sequence
from functools import partial

from moecluster.controller.context import ControllerContext
from moecluster.controller.operations.expert_actors import Sizing
from moecluster.errors import CheckpointError, InvalidMessage, MoeClusterError, ResourceError
from moecluster.models.checkpoint.reader import OpenCheckpoint, open_checkpoint
from moecluster.models.experts.source import ExpertSource
from moecluster.models.given_directories import IsGiven, check_given
from moecluster.models.update.compatibility import check_same_shape, sizes
from moecluster.types import ExpertId, Operation, OperationKind

MIN_NODE_PREFIX = 4


class OperationRequests:
    """Thread-safe. A request with the id of a known operation returns that operation, even if what it names is gone.

    The requests of users raise ResourceError while training holds the placement.
    """

    def __init__(
        self,
        context: ControllerContext,
        *,
        min_actors: int,
        max_actors: int,
        sizing: Sizing,
        is_given: IsGiven,
        announce: Callable[[str], None] = lambda checkpoint: None,
        open_elsewhere: OpenCheckpoint | None = None,
    ) -> None:
        """max_actors: 0 for no limit. is_given: whether weights may be loaded from a directory. announce: makes a
        directory readable on nodes that do not see it, if a node that sees it can serve it. open_elsewhere: opens
        checkpoints that this node does not see."""
        self._min_actors = min_actors
        self._max_actors = max_actors
        self._cluster_state = context.state
        self._leases = context.leases
        self._log = context.operations
        self._signals = context.signals
        self._sizing = sizing
        self._is_given = is_given
        self._announce = announce
        self._open_elsewhere = open_elsewhere

    def scale(self, expert_actors: int, operation_id: str) -> Operation:
        """Requests a number of expert actors. Raises ResourceError beyond the limits."""
        lowest, highest = self._min_actors, self._max_actors
        if expert_actors < lowest or (highest and expert_actors > highest):
            limit = f"{lowest} to {highest}" if highest else f"{lowest} or more"
            raise ResourceError(
                f"scale: {expert_actors} expert actors are beyond the limits, which are {limit} "
                "(controller.min_expert_actors, controller.max_expert_actors)"
            )
        self._sizing.check_size(expert_actors, OperationKind.SCALE)
        return self._request(OperationKind.SCALE, (str(expert_actors),), operation_id)

    def drain(self, node: str, operation_id: str) -> Operation:
        """node: its id or a unique prefix of it, or an expert actor. Raises ResourceError if there is none of that
        name."""
        up = self._cluster_state.up()
        nodes = sorted({u.address.node for u in up.values() if u.address.node})
        matching = [n for n in nodes if n == node or (len(node) >= MIN_NODE_PREFIX and n.startswith(node))]
        if len(matching) == 1:
            node = matching[0]
        elif node not in self._cluster_state.actors:
            self._refuse_unknown(operation_id, f'drain: no node or expert actor "{node}"', [*nodes, *up])
        return self._request(OperationKind.DRAIN, (node,), operation_id)

    def place(self, expert: ExpertId, actors: Sequence[str], operation_id: str) -> Operation:
        """Raises ResourceError for an unknown expert, or for an actor that is unknown or named twice."""
        self._check_expert(expert, ResourceError)
        unknown = [actor for actor in actors if actor not in self._cluster_state.actors]
        if unknown:
            self._refuse_unknown(operation_id, f'place: no expert actor "{unknown[0]}"', self._cluster_state.actors)
        if len(set(actors)) < len(actors):
            raise ResourceError(f"place {expert}: an actor is named twice; it holds one replica of an expert")
        return self._request(OperationKind.PLACE, (str(expert), *actors), operation_id)

    def update(self, checkpoint: str, operation_id: str) -> Operation:
        """Raises NotGiven for a directory that the cluster was not given, CheckpointError for one that is incomplete or
        differs in shape from the served model, ResourceError for the directory of the newest version."""
        if not self._is_known(operation_id):
            versions = self._cluster_state.versions
            newest = versions.all[-1]
            if newest.checkpoint == checkpoint:
                raise ResourceError(
                    f"update: {checkpoint} is weight version {newest.version} already; write new weights to another "
                    "directory"
                )
            check_given(checkpoint, self._is_given)
            self._announce(checkpoint)
            served, wanted = (open_checkpoint(path, self._open_elsewhere) for path in (versions.checkpoint, checkpoint))
            check_same_shape(served, wanted)
        return self._request(OperationKind.UPDATE, (checkpoint,), operation_id)

    def set_checkpoint(self, checkpoint: str) -> None:
        """Sets the directory that lost experts are loaded from. Raises, without a change, CheckpointError if it is not
        a complete checkpoint with the served number of experts, NotGiven if the cluster was not given it."""
        if not os.path.isabs(checkpoint):
            raise CheckpointError(f"{checkpoint}: expected an absolute path, since actors on other nodes read it")
        check_given(checkpoint, self._is_given)
        found, served = sizes(ExpertSource(open_checkpoint(checkpoint, self._open_elsewhere))), self._cluster_state
        if found != dict(served.layer_experts):
            raise CheckpointError(
                f"{checkpoint} is of another model than is served: its experts (layer: number) are {found}, "
                f"not {dict(served.layer_experts)}"
            )
        served.set_checkpoint(checkpoint)

    def activate(self, router: str, experts: Sequence[ExpertId]) -> None:
        """A router has tokens for these experts: queues the cold ones to be loaded. Raises InvalidMessage for unknown
        experts."""
        for expert in experts:
            self._check_expert(expert, partial(InvalidMessage, "experts"))
        cold = sorted(set(experts) & self._cluster_state.cold)
        asked = {name for o in self._log.under_way() if o.kind is OperationKind.ACTIVATE for name in o.arguments}
        names = tuple(str(expert) for expert in cold if str(expert) not in asked)
        if names:
            self._log.enqueue(OperationKind.ACTIVATE, reason=f"{router} has tokens for these experts", arguments=names)
            self._signals.wake.emit()

    def _request(self, kind: OperationKind, arguments: tuple[str, ...], operation_id: str) -> Operation:
        if self._cluster_state.held or self._leases.any_hold():
            raise ResourceError(f"{kind}: a training run holds the placement; try again when the run has ended")
        operation = self._log.enqueue(kind, reason="requested", arguments=arguments, operation_id=operation_id)
        self._signals.wake.emit()
        return operation

    def _refuse_unknown(self, operation_id: str, what: str, known: Collection[str]) -> None:
        """Raises ResourceError, unless the operation is known: what it named may be gone by now."""
        if not self._is_known(operation_id):
            raise ResourceError(f"{what}; there are {', '.join(sorted(known))}")

    def _is_known(self, operation_id: str) -> bool:
        return bool(operation_id) and any(o.id == operation_id for o in self._log.newest())

    def _check_expert(self, expert: ExpertId, error: Callable[[str], MoeClusterError]) -> None:
        count = self._cluster_state.layer_experts.get(expert.layer)
        if count is None or not 0 <= expert.index < count:
            layers = ", ".join(f"{at}/0 to {at}/{n - 1}" for at, n in sorted(self._cluster_state.layer_experts.items()))
            raise error(f"there is no expert {expert}; the experts are {layers[:200]}")
