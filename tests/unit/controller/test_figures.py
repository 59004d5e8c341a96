"""What the controller's metrics say of the cluster, and that /health says the same."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from moecluster.controller.context import ControllerContext
from moecluster.controller.figures import cluster_figures
from moecluster.controller.rebalance.decide import Planner
from moecluster.controller.state.operation_log import OperationLog
from moecluster.gateway.health import health_of
from moecluster.gateway.served_model import ServedModel
from moecluster.metrics import Metrics
from moecluster.metrics.operations import ClusterFigures
from moecluster.types import ActorPhase, ActorState, ControllerStatus, Operation, OperationKind, OperationPhase

NOW_S, UNIX_S = 100.0, 5000.0


def status_of(*phases: ActorPhase, **others: Any) -> ControllerStatus:
    actors = tuple(
        ActorState(actor=f"expert-{i}", address="", incarnation="", phase=phase, experts=1, restarts=0)
        for i, phase in enumerate(phases)
    )
    return ControllerStatus(term=1, generation=1, checkpoint="", routers=1, actors=actors, **others)


def figures_of(
    status: ControllerStatus, *, decided_s: float | None = None, read_s: float | None = None
) -> ClusterFigures:
    operations = OperationLog(Metrics(model="m"), unix_clock=lambda: UNIX_S)
    context = cast(ControllerContext, SimpleNamespace(clock=lambda: NOW_S, operations=operations))
    planner = cast(Planner, SimpleNamespace(decided_s=decided_s, observer=SimpleNamespace(read_s=read_s)))
    return cluster_figures(context, planner, lambda: status)


def health_status(status: ControllerStatus) -> str:
    discovery = SimpleNamespace(answering=1, cluster=status, has_controller=True, ended="")
    return health_of([cast(ServedModel, SimpleNamespace(name="m", discovery=discovery))]).status


@pytest.mark.parametrize(
    "status",
    [
        status_of(ActorPhase.SERVING, ActorPhase.SERVING),
        status_of(ActorPhase.SERVING, ActorPhase.LOADING),
        status_of(ActorPhase.RESTARTING),
        status_of(ActorPhase.SERVING, lost_experts=1),
        status_of(ActorPhase.SERVING, cold_experts=3, held=True),
    ],
)
def test_the_gauge_is_1_exactly_when_health_says_degraded(status: ControllerStatus) -> None:
    assert figures_of(status).degraded == (health_status(status) == "degraded")


def operation(kind: OperationKind, phase: OperationPhase, created_s: float = UNIX_S) -> Operation:
    return Operation(id="o", kind=kind, phase=phase, reason="", created_s=created_s)


@pytest.mark.parametrize(
    ("kind", "phase", "is_rebalancing"),
    [
        (OperationKind.REBALANCE, OperationPhase.PREPARING, True),
        (OperationKind.DRAIN, OperationPhase.COMMITTING, True),
        (OperationKind.SCALE, OperationPhase.QUEUED, False),
        (OperationKind.UPDATE, OperationPhase.PREPARING, False),
        (OperationKind.SCALE_ROUTERS, OperationPhase.PREPARING, False),
    ],
)
def test_it_rebalances_while_an_operation_changes_the_placement(
    kind: OperationKind, phase: OperationPhase, is_rebalancing: bool
) -> None:
    assert figures_of(status_of(operations=(operation(kind, phase),))).rebalancing == is_rebalancing


def test_ages_are_those_of_the_oldest_operation_the_last_plan_and_the_last_load() -> None:
    scale, phase = OperationKind.SCALE, OperationPhase.QUEUED
    operations = tuple(operation(scale, phase, UNIX_S - age_s) for age_s in (5.0, 60.0, 7.0))
    found = figures_of(status_of(operations=operations), decided_s=98.0, read_s=99.5)
    assert found.operation_age_s == {"scale": 60.0}
    assert (found.plan_age_s, found.load_age_s) == (2.0, 0.5)
    before = figures_of(status_of())
    assert before.plan_age_s is None and before.load_age_s is None


def test_actors_are_counted_in_every_phase() -> None:
    found = figures_of(status_of(ActorPhase.SERVING, ActorPhase.SERVING, ActorPhase.LOADING))
    assert found.actors == {"serving": 2, "loading": 1, "restarting": 0}
