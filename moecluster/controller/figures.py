"""The state of the cluster as the controller's metrics show it."""

from collections import Counter
from collections.abc import Callable

from moecluster.controller.context import ControllerContext
from moecluster.controller.rebalance.decide import Planner
from moecluster.metrics.operations import ClusterFigures
from moecluster.types import ActorPhase, ControllerStatus, OperationKind, OperationPhase

CHANGING = frozenset({OperationPhase.PREPARING, OperationPhase.COMMITTING})
LEAVE_PLACEMENT = frozenset({OperationKind.UPDATE, OperationKind.SCALE_ROUTERS})  # kinds that move no replica


def cluster_figures(
    context: ControllerContext, planner: Planner, status: Callable[[], ControllerStatus]
) -> ClusterFigures:
    """Returns the figures of now."""
    seen, now_s = status(), context.clock()
    phases = Counter(actor.phase for actor in seen.actors)
    ages: dict[str, float] = {}
    for operation in seen.operations:
        ages[operation.kind] = max(ages.get(operation.kind, 0.0), context.operations.age_s(operation))
    return ClusterFigures(
        degraded=seen.is_degraded,
        rebalancing=any(o.phase in CHANGING and o.kind not in LEAVE_PLACEMENT for o in seen.operations),
        held=seen.held,
        lost_experts=seen.lost_experts,
        cold_experts=seen.cold_experts,
        replicas_aside=len(seen.replicas_aside),
        routers=seen.routers,
        actors={phase.value: phases[phase] for phase in ActorPhase},
        operation_age_s=ages,
        plan_age_s=None if planner.decided_s is None else now_s - planner.decided_s,
        load_age_s=None if planner.observer.read_s is None else now_s - planner.observer.read_s,
    )
