"""Requests of users and routers to a controller, also while an actor is lost."""

from typing import Any

from moecluster.controller.rebalance.decide import Change, Planner
from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.errors import ResourceError
from moecluster.placement.initial import all_experts
from moecluster.placement.policy.static import StaticPolicy
from moecluster.types import ExpertId, OperationPhase
from tests.support.clusters.controllers import ACTORS, LAYER_EXPERTS, static, wait_ended, wait_for_placement
from tests.support.waiting import WAIT_S, wait_until


def test_a_change_of_a_layer_leaves_what_a_lost_actor_shall_hold_as_it_was(make, actors) -> None:
    controller = make(**static())
    controller.start(WAIT_S)
    actors.kill("expert-1")
    wait_for_placement(controller, lambda p: "expert-1" not in p.actors)
    cold, kept = ExpertId(layer=0, index=0), ExpertId(layer=0, index=2)
    assert wait_ended(controller, controller.place(cold, [])).phase is OperationPhase.DONE
    actors.revive("expert-1")
    back = wait_for_placement(controller, lambda p: "expert-1" in p.actors)
    assert [r.actor for r in back.replicas_of(kept)] == ["expert-1"], "once"
    assert back.replicas_of(cold) == ()


def test_an_expert_that_is_placed_elsewhere_does_not_come_back_with_the_actor_that_had_it(make, actors) -> None:
    controller = make(**static(slots=3))
    controller.start(WAIT_S)
    placed = ExpertId(layer=0, index=2)
    assert wait_ended(controller, controller.place(placed, ["expert-0", "expert-1"])).phase is OperationPhase.DONE
    actors.kill("expert-1")
    wait_for_placement(controller, lambda p: "expert-1" not in p.actors)
    assert wait_ended(controller, controller.place(placed, ["expert-0"])).phase is OperationPhase.DONE
    actors.revive("expert-1")
    back = wait_for_placement(controller, lambda p: "expert-1" in p.actors)
    assert [r.actor for r in back.replicas_of(placed)] == ["expert-0"]


def test_an_error_of_a_policy_ends_neither_the_operation_nor_the_thread_that_changes_things(make, monkeypatch) -> None:
    controller = make(**static(slots=4))
    controller.start(WAIT_S)

    def broken(*_: Any) -> None:
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(StaticPolicy, "decide", broken)
    failed = wait_ended(controller, controller.scale(2))
    assert failed.phase is OperationPhase.FAILED and "see its log" in failed.detail
    done = wait_ended(controller, controller.place(ExpertId(layer=0, index=0), ["expert-1"]))
    assert done.phase is OperationPhase.DONE


def test_an_order_that_failed_for_a_lost_actor_is_tried_again_though_it_is_back_by_then(
    make, actors, monkeypatch
) -> None:
    controller = make(**static(slots=4), min_actors=1)
    controller.start(WAIT_S)
    actors.kill("expert-0")
    wait_for_placement(controller, lambda p: "expert-0" not in p.actors)
    fill = Planner.fill

    def fail_and_wait(self: Planner) -> Change:
        try:
            return fill(self)
        except ResourceError:
            actors.revive("expert-0")
            wait_for_placement(controller, lambda p: "expert-0" in p.actors)
            raise

    monkeypatch.setattr(Planner, "fill", fail_and_wait)
    assert wait_ended(controller, controller.scale(1)).phase is OperationPhase.DONE


def test_a_size_that_is_ordered_while_an_actor_is_lost_comes_when_it_is_back(make, actors) -> None:
    controller = make(**static(slots=4), min_actors=1)
    controller.start(WAIT_S)
    actors.kill("expert-0")
    wait_for_placement(controller, lambda p: "expert-0" not in p.actors)
    operation = controller.scale(1)
    wait_until(lambda: "waits: " in controller.operation(operation.id).detail)
    actors.revive("expert-0")
    assert wait_ended(controller, operation).phase is OperationPhase.DONE
    assert set(controller.current(0.0).actors) == {"expert-0"}
    assert set(controller.current(0.0).experts_on("expert-0")) == set(all_experts(LAYER_EXPERTS))


def test_a_size_that_cannot_be_leaves_the_actors_as_they_were(make, actors) -> None:
    settings = static(slots=4)
    settings["reconciler"] = ReconcilerSettings(policy="static", period_s=0.02, operation_timeout_s=0.3)
    controller = make(**settings)
    controller.start(WAIT_S)
    actors.kill("expert-0")
    wait_for_placement(controller, lambda p: "expert-0" not in p.actors)
    assert wait_ended(controller, controller.scale(1)).phase is OperationPhase.FAILED
    actors.revive("expert-0")
    back = wait_for_placement(controller, lambda p: "expert-0" in p.actors)
    assert set(back.actors) == set(ACTORS)
    done = wait_ended(controller, controller.place(ExpertId(layer=0, index=0), ["expert-1"]))
    assert done.phase is OperationPhase.DONE, "it takes replicas"


def test_while_a_size_waits_for_an_actor_tokens_wake_experts_and_later_sizes_wait(make, actors, monkeypatch) -> None:
    monkeypatch.setattr(actors, "create", lambda actor, avoid_nodes=(): None)  # Ray has no room for it
    controller = make(**static(slots=4))
    controller.start(WAIT_S)
    cold = ExpertId(layer=1, index=3)
    assert wait_ended(controller, controller.place(cold, [])).phase is OperationPhase.DONE
    grow, shrink = controller.scale(3), controller.scale(1)
    wait_until(lambda: "expert-2 does not serve yet" in controller.operation(grow.id).detail)
    controller.want_experts("router", [cold])
    wait_for_placement(controller, lambda p: len(p.replicas_of(cold)) == 1)
    assert not controller.operation(grow.id).phase.ended and not controller.operation(shrink.id).phase.ended
    actors.revive("expert-2")
    assert wait_ended(controller, grow).phase is OperationPhase.DONE
    assert wait_ended(controller, shrink).phase is OperationPhase.DONE
    assert set(controller.current(0.0).actors) == {"expert-0"}
