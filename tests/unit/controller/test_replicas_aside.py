"""Replicas that answer NaN or infinity: reloaded once, and given up for good if that does not help."""

import pytest

from moecluster.controller.actors.replicas_aside import RELOADED, RELOADING, SICK, ReplicasAside
from moecluster.controller.context import ControllerContext, new_context
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.metrics import Metrics
from moecluster.placement.initial import contiguous_placement
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import ActorAddress, ExpertId, OperationPhase, WeightVersion

ACTOR = "expert-0"
EXPERT = ExpertId(layer=0, index=1)


@pytest.fixture
def context() -> ControllerContext:
    """Of a controller with one actor, which is up."""
    context = new_context({0: 2}, lease_s=1.0, board=PlacementBoard(), metrics=Metrics(model="tiny"))
    state = context.state
    state.begin(
        term=1,
        generation=1,
        versions=WeightVersions.only(WeightVersion(version=1, checkpoint="/m")),
        actors=(ACTOR,),
        replicas=contiguous_placement({0: 2}, (ACTOR,)),
    )
    state.actor_up(ActorAddress(actor=ACTOR, address="127.0.0.1:1", incarnation="a"), state.assigned(ACTOR))
    state.open()
    return context


def report(aside: ReplicasAside, context: ControllerContext) -> None:
    aside.report(ACTOR, "a", EXPERT, context.state.number)


def states(aside: ReplicasAside) -> list[str]:
    return [replica.state for replica in aside.states()]


def test_a_replica_is_reloaded_once_and_then_given_up(context: ControllerContext) -> None:
    checked: list[str] = []
    aside = ReplicasAside(context, check=checked.append)
    report(aside, context)
    assert states(aside) == [RELOADING] and aside.to_reload(ACTOR) == {EXPERT}
    aside.reloaded(ACTOR, [EXPERT], 10)
    assert states(aside) == [RELOADED] and not aside.to_reload(ACTOR)
    report(aside, context)
    assert states(aside) == [SICK] and not aside.to_reload(ACTOR)
    assert checked == [ACTOR, ACTOR]


def test_a_reload_that_ends_late_brings_no_replica_back_that_was_given_up(context: ControllerContext) -> None:
    aside = ReplicasAside(context, check=lambda actor: None)
    report(aside, context)
    aside.reloaded(ACTOR, [EXPERT], 10)
    report(aside, context)
    aside.reloaded(ACTOR, [EXPERT], 10)
    assert states(aside) == [SICK]
    report(aside, context)
    assert states(aside) == [SICK]
    assert [o.phase for o in context.operations.newest()] == [OperationPhase.FAILED, OperationPhase.DONE]
