"""When lost experts are loaded on other actors, and when other changes yield to that."""

import pytest

from moecluster.controller.context import ControllerContext, new_context
from moecluster.controller.rebalance.recovery import Recovery
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.metrics import Metrics
from moecluster.placement.initial import contiguous_placement
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import ActorAddress, WeightVersion

LAYER_EXPERTS = {0: 4}
ACTORS = ("expert-0", "expert-1")


def bring_up(context: ControllerContext, actor: str) -> None:
    address = ActorAddress(actor=actor, address="127.0.0.1:1", incarnation="a")
    context.state.actor_up(address, context.state.assigned(actor))


@pytest.fixture
def context() -> ControllerContext:
    """Both actors are up, with two experts each."""
    context = new_context(LAYER_EXPERTS, lease_s=1.0, board=PlacementBoard(), metrics=Metrics(model="tiny"))
    context.state.begin(
        term=1,
        generation=0,
        versions=WeightVersions.only(WeightVersion(version=1, checkpoint="/m")),
        actors=ACTORS,
        replicas=contiguous_placement(LAYER_EXPERTS, ACTORS),
    )
    for actor in ACTORS:
        bring_up(context, actor)
    return context


def test_lost_experts_can_be_loaded_where_a_slot_is_free(context: ControllerContext) -> None:
    roomy, full = Recovery(context, slots_per_layer=3), Recovery(context, slots_per_layer=2)
    assert not roomy.is_possible() and not roomy.is_due(), "nothing is lost"
    context.state.actor_down("expert-1")
    assert roomy.is_possible() and roomy.is_due()
    assert not full.is_possible() and not full.is_due()
    context.state.set_leaving(["expert-0"])
    assert not roomy.is_possible(), "an actor that leaves takes no replicas"


def test_other_changes_give_way_again_only_when_something_has_changed(context: ControllerContext) -> None:
    recovery = Recovery(context, slots_per_layer=4)
    context.state.actor_down("expert-1")
    with recovery.attempt():
        pass  # the policy had no answer
    assert recovery.is_possible() and not recovery.is_due(), "it was tried in vain"
    context.state.actor_down("expert-0")
    bring_up(context, "expert-1")
    assert recovery.is_due(), "other experts are lost, and another actor is up"
    with recovery.attempt():
        bring_up(context, "expert-0")
    assert not recovery.is_possible()
    context.state.actor_down("expert-1")
    assert recovery.is_due(), "what was in vain once is tried anew after a success"


def test_an_attempt_that_breaks_off_is_made_again(context: ControllerContext) -> None:
    recovery = Recovery(context, slots_per_layer=4)
    context.state.actor_down("expert-1")
    with pytest.raises(RuntimeError), recovery.attempt():
        raise RuntimeError("a bug")
    assert recovery.is_due()
