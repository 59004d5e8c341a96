"""Ray's notices of nodes that it is about to remove: each becomes a drain of the node's expert actors."""

import logging
import math

from moecluster.controller.actors.interfaces import ActorSupervisor
from moecluster.controller.context import ControllerContext
from moecluster.errors import Exhausted, MoeClusterError
from moecluster.types import OperationKind

logger = logging.getLogger(__name__)


class NodeDrains:
    """Used by one thread at a time."""

    def __init__(self, context: ControllerContext, *, supervisor: ActorSupervisor) -> None:
        self._cluster_state = context.state
        self._log = context.operations
        self._supervisor = supervisor
        self._nodes: frozenset[str] = frozenset()
        self._drained_last: dict[str, frozenset[str]] = {}  # node -> actors up and not leaving at its last drain
        self._answers = True  # whether the supervisor answered last time

    def nodes(self) -> frozenset[str]:
        """The nodes that are about to be removed, as of the last answer."""
        return self._nodes

    def enqueue(self) -> None:
        """Queues a drain of each node that is about to be removed and has staying actors."""
        try:
            left_s = self._supervisor.draining_nodes()
        except MoeClusterError as exc:  # no answer is not "none": what was announced stays so
            if self._answers:
                logger.warning("which nodes are about to be removed is not known: %s", exc)
            self._answers = False
            return
        self._answers, self._nodes = True, frozenset(left_s)
        leaving = self._cluster_state.leaving
        staying = {actor: up for actor, up in self._cluster_state.up().items() if actor not in leaving}
        waiting = {operation.arguments for operation in self._log.under_way() if operation.kind is OperationKind.DRAIN}
        for node in sorted({up.address.node for up in staying.values()} & self._nodes):
            # A failed drain would fail again with the same actors.
            if (node,) in waiting or self._drained_last.get(node) == frozenset(staying):
                continue
            try:
                self._log.enqueue(OperationKind.DRAIN, reason=_reason(left_s[node]), arguments=(node,))
            except Exhausted as exc:
                logger.warning("node %s is not drained yet: %s", node, exc)
                return
            self._drained_last[node] = frozenset(staying)


def _reason(left_s: float) -> str:
    within = "" if math.isinf(left_s) else f", in {max(left_s, 0.0):.0f} s"
    return f"Ray is about to remove the node{within}"
