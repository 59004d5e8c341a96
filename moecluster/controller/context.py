"""State and services that all parts of a controller share."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moecluster.controller.load.reports import ActorReports
from moecluster.controller.signals import Signals
from moecluster.controller.state.cluster_state import ClusterState
from moecluster.controller.state.operation_log import OperationLog
from moecluster.controller.state.router_leases import Leases
from moecluster.metrics import Metrics
from moecluster.rpc.controller.latest_placement import PlacementBoard


@dataclass(frozen=True, kw_only=True)
class ControllerContext:
    """Each field is thread-safe."""

    state: ClusterState
    leases: Leases
    operations: OperationLog
    reports: ActorReports
    metrics: Metrics
    signals: Signals
    clock: Callable[[], float]  # seconds, for leases and durations


def new_context(
    layer_experts: Mapping[int, int],
    *,
    lease_s: float,
    board: PlacementBoard,
    metrics: Metrics,
    clock: Callable[[], float] = time.monotonic,
) -> ControllerContext:
    """Returns the context of a new controller.

    layer_experts: MoE layer -> its number of experts. lease_s: of each router. board: where placements are published.
    """
    signals = Signals()
    return ControllerContext(
        state=ClusterState(layer_experts, board=board, metrics=metrics, on_change=signals.changed.emit),
        leases=Leases(lease_s, clock=clock),
        operations=OperationLog(metrics, on_change=signals.changed.emit),
        reports=ActorReports(),
        metrics=metrics,
        signals=signals,
        clock=clock,
    )
