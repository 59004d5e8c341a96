"""Nodes that come and go under a controller: which actors leave, what a notice starts, and what no answer means."""

import dataclasses
from typing import Any

from moecluster.errors import Unavailable
from moecluster.placement.initial import all_experts
from moecluster.types import OperationKind, OperationPhase
from tests.support.clusters.controllers import LAYER_EXPERTS, static, wait_ended, wait_for_placement
from tests.support.waiting import WAIT_S, wait_until


def quick(**changes: Any) -> dict[str, Any]:
    """Settings of a controller that only does what is requested, with changed reconciler settings."""
    settings = static(slots=4)
    settings["reconciler"] = dataclasses.replace(settings["reconciler"], **changes)
    return settings


def test_a_smaller_cluster_frees_a_node_and_keeps_that_of_the_controller(make, actors) -> None:
    actors.nodes = {"expert-0": "worker", "expert-1": "head", "expert-2": "worker", "expert-3": "other"}
    actors.shared = {"head"}
    controller = make(**quick())
    controller.start(WAIT_S)
    wait_ended(controller, controller.scale(4))
    assert wait_ended(controller, controller.scale(3)).phase is OperationPhase.DONE
    assert set(actors.services) == {"expert-0", "expert-1", "expert-2"}
    assert wait_ended(controller, controller.scale(1)).phase is OperationPhase.DONE
    assert set(actors.services) == {"expert-1"}
    assert set(controller.current(0.0).experts_on("expert-1")) == set(all_experts(LAYER_EXPERTS))


def test_an_actor_that_never_came_up_leaves_first(make, actors, monkeypatch) -> None:
    controller = make(**quick(operation_timeout_s=0.2))
    controller.start(WAIT_S)
    monkeypatch.setattr(actors, "create", lambda actor, avoid_nodes=(): None)
    grow = controller.scale(3)
    wait_until(lambda: "expert-2 does not serve yet" in controller.operation(grow.id).detail)
    assert wait_ended(controller, grow).phase is OperationPhase.FAILED
    assert {state.actor for state in controller.status().actors} == {"expert-0", "expert-1"}


def test_while_ray_does_not_answer_requests_are_carried_out_and_no_actor_is_ended(make, actors) -> None:
    controller = make(**quick(stray_s=0.0))
    controller.start(WAIT_S)
    actors.silence = Unavailable("Ray is away")
    actors.create("expert-7")
    assert wait_ended(controller, controller.scale(3)).phase is OperationPhase.DONE
    assert wait_ended(controller, controller.scale(2)).phase is OperationPhase.DONE
    assert "expert-7" in actors.services
    actors.silence = None
    wait_until(lambda: "expert-7" not in actors.services, "the stray is ended")
    assert set(actors.services) == {"expert-0", "expert-1"}


def test_a_controller_waits_for_ray_s_answer_before_it_takes_over(make, actors) -> None:
    first = make(**quick())
    first.start(WAIT_S)
    before = wait_for_placement(first, lambda p: len(p.actors) == 2)
    wait_until(lambda: all(s.status().placement == first.current(0.0).number for s in actors.services.values()))
    first.close()
    asked = []

    def known() -> tuple[str, ...]:
        asked.append(True)
        if len(asked) < 3:
            raise Unavailable("Ray is away")
        return tuple(actors.services)

    second = make(**quick(), start_timeout_s=WAIT_S)
    actors.known = known
    second.start(WAIT_S)
    assert len(asked) >= 4 and second.current(0.0).term == before.term + 1
    assert second.current(0.0).replicas == before.replicas


def test_a_successor_does_not_adopt_an_actor_whose_end_did_not_arrive(make, actors) -> None:
    first = make(**quick())
    first.start(WAIT_S)
    wait_until(lambda: all(s.status().placement == first.current(0.0).number for s in actors.services.values()))
    first.close()
    actors.create("expert-5")
    second = make(**quick(stray_s=0.0))
    second.start(WAIT_S)
    assert {state.actor for state in second.status().actors} == {"expert-0", "expert-1"}
    wait_until(lambda: "expert-5" not in actors.services, "the stray is ended")


def test_a_drain_whose_node_is_gone_before_it_ended_removes_its_actors_and_says_what_was_late(
    make, actors, monkeypatch
) -> None:
    settings = static(slots=2)
    controller = make(**settings)
    controller.start(WAIT_S)
    create, created = actors.create, []
    monkeypatch.setattr(actors, "create", lambda actor, avoid_nodes=(): created.append((actor, set(avoid_nodes))))
    actors.draining = {"node-of-expert-1"}
    wait_until(lambda: created == [("expert-2", {"node-of-expert-1"})] or len(created) > 1)
    drain = next(o for o in controller.operations(0) if o.kind is OperationKind.DRAIN)
    assert drain.reason == "Ray is about to remove the node"
    actors.kill("expert-1")  # its node is gone; Ray has no other for it
    actors.draining = set()
    wait_for_placement(controller, lambda p: "expert-1" not in p.actors)
    create("expert-2")
    done = wait_ended(controller, drain)
    assert done.phase is OperationPhase.DONE
    assert done.detail == "not moved in time: expert-1 was lost with 4 replicas"
    assert set(controller.current(0.0).actors) == {"expert-0", "expert-2"} == set(actors.services)


def test_a_notice_tells_how_long_there_is(make, actors) -> None:
    controller = make(**quick())
    controller.start(WAIT_S)
    actors.draining_nodes = lambda: {"node-of-expert-1": 29.7}
    wait_until(lambda: any(o.kind is OperationKind.DRAIN for o in controller.operations(0)))
    drain = next(o for o in controller.operations(0) if o.kind is OperationKind.DRAIN)
    assert drain.reason == "Ray is about to remove the node, in 30 s"
    done = wait_ended(controller, drain)
    assert (done.phase, done.detail) == (OperationPhase.DONE, "")


def test_nothing_is_moved_to_a_node_that_goes_too(make, actors) -> None:
    controller = make(**quick())
    controller.start(WAIT_S)
    wait_ended(controller, controller.scale(3))
    actors.draining = {"node-of-expert-0", "node-of-expert-1"}
    wait_until(lambda: set(actors.services) == {"expert-2"})
    drains = [o for o in controller.operations(0) if o.kind is OperationKind.DRAIN]
    assert len(drains) <= 2 and sum(o.added_replicas for o in drains) <= 16, "each expert is moved once at most"
