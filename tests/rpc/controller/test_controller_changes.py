"""User operations while a cluster serves, over real gRPC: the router must not notice."""

import pytest

from moecluster.errors import ConfigError, ResourceError
from moecluster.types import NO_PLACEMENT, ExpertId, OperationKind, OperationPhase
from tests.support.clusters.changing_cluster import Traffic, actors_of, assert_whole, held
from tests.support.models.weight_versions import done, ended
from tests.support.waiting import wait_until


def test_scaling_up_and_down_moves_experts_while_every_request_is_answered(start) -> None:
    cluster = start(2)
    with Traffic(cluster):
        up = done(cluster, cluster.controller.scale(4))
        assert set(cluster.controller.current(0.0).actors) == {f"expert-{i}" for i in range(4)}
        assert all(held(cluster, f"expert-{i}") for i in range(4)), "new actors are filled"
        assert up.added_replicas >= 4 and up.moved_bytes > 0
        assert_whole(cluster)
        done(cluster, cluster.controller.scale(2))
        assert set(cluster.controller.current(0.0).actors) == {"expert-0", "expert-1"}
        assert set(cluster.services) == {"expert-0", "expert-1"}, "the actors themselves are ended"
        assert_whole(cluster)


def test_in_batch_invariant_mode_no_bit_of_an_answer_changes_while_experts_move(start) -> None:
    cluster = start(2, batch_invariant=True)
    with Traffic(cluster, exactly=True):
        done(cluster, cluster.controller.scale(3))
        done(cluster, cluster.controller.place(ExpertId(layer=0, index=1), ["expert-0", "expert-1", "expert-2"]))
        done(cluster, cluster.controller.place(ExpertId(layer=0, index=1), ["expert-2"]))
        done(cluster, cluster.controller.scale(2))
        assert_whole(cluster)


def test_the_same_id_is_the_same_operation(start) -> None:
    cluster = start(2)
    first = cluster.controller.scale(3, operation_id="grow")
    again = cluster.controller.scale(3, operation_id="grow")
    assert again.id == first.id == "grow"
    done(cluster, first)
    assert cluster.controller.scale(3, operation_id="grow").phase is OperationPhase.DONE
    assert len([o for o in cluster.controller.operations(0) if o.kind is OperationKind.SCALE]) == 1
    with pytest.raises(ResourceError, match="grow is scale 3 already"):
        cluster.controller.scale(2, operation_id="grow")


def test_a_drained_node_is_emptied_and_its_actor_ended(start) -> None:
    cluster = start(3)
    with Traffic(cluster):
        done(cluster, cluster.controller.drain("node-of-expert-1"))
        assert set(cluster.controller.current(0.0).actors) == {"expert-0", "expert-2"}
        assert_whole(cluster)


def test_an_expert_is_placed_by_hand_on_exactly_these_actors(start) -> None:
    cluster = start(3, policy="static")
    with Traffic(cluster):
        done(cluster, cluster.controller.place(ExpertId(layer=0, index=1), ["expert-0", "expert-2"]))
        assert actors_of(cluster, 0, 1) == ["expert-0", "expert-2"]
        done(cluster, cluster.controller.place(ExpertId(layer=0, index=1), ["expert-1"]))
        assert actors_of(cluster, 0, 1) == ["expert-1"]
        assert_whole(cluster)


def test_nothing_moves_while_a_router_holds_the_placement(start) -> None:
    cluster = start(2)
    cluster.controller.renew_lease("trainer", NO_PLACEMENT, hold=True)
    wait_until(lambda: cluster.controller.current(0.0).held)
    with pytest.raises(ResourceError, match="a training run holds the placement"):
        cluster.controller.scale(3)
    cluster.controller.renew_lease("trainer", NO_PLACEMENT, hold=False)
    wait_until(lambda: not cluster.controller.current(0.0).held)
    done(cluster, cluster.controller.scale(3))


def test_training_finds_every_expert_once_and_none_cold(start) -> None:
    cluster = start(2, policy="static")
    done(cluster, cluster.controller.place(ExpertId(layer=0, index=0), ["expert-0", "expert-1"]))
    done(cluster, cluster.controller.place(ExpertId(layer=1, index=3), []))
    cluster.controller.renew_lease("trainer", NO_PLACEMENT, hold=True)
    wait_until(lambda: cluster.controller.current(0.0).held)
    placement = cluster.controller.current(0.0)
    counts = {(r.expert.layer, r.expert.index): len(placement.replicas_of(r.expert)) for r in placement.replicas}
    assert counts == {(layer, index): 1 for layer in (0, 1) for index in range(4)}
    assert_whole(cluster)


def test_a_successor_has_the_same_snapshot_and_goes_on_with_what_was_ordered(start) -> None:
    cluster = start(2)
    with Traffic(cluster):
        done(cluster, cluster.controller.scale(3))
        done(cluster, cluster.controller.place(ExpertId(layer=1, index=0), []))
        wait_until(
            lambda: all(
                s.status().placement == cluster.controller.current(0.0).number for s in cluster.services.values()
            )
        )
        before = cluster.controller.current(0.0)
        operations = {o.id: o for o in cluster.controller.operations(0)}
        cluster.replace_controller()
        after = cluster.controller.current(0.0)
        assert after.term == before.term + 1
        assert after.replicas == before.replicas and set(after.actors) == set(before.actors)
        assert cluster.controller.status().cold_experts == 1
        assert {o.id: o.phase for o in cluster.controller.operations(0)} == {i: o.phase for i, o in operations.items()}


@pytest.mark.parametrize(
    ("order", "complaint"),
    [
        (lambda c: c.scale(0), "scale: 0 expert actors are beyond the limits, which are 1 or more"),
        (lambda c: c.drain("nowhere"), 'no node or expert actor "nowhere"; there are expert-0, expert-1'),
        (lambda c: c.place(ExpertId(layer=0, index=9), ["expert-0"]), "there is no expert 0/9"),
        (lambda c: c.place(ExpertId(layer=0, index=0), ["expert-7"]), 'no expert actor "expert-7"'),
        (lambda c: c.place(ExpertId(layer=0, index=0), ["expert-0", "expert-0"]), "an actor is named twice"),
        (lambda c: c.operation("none"), 'no operation "none" is known'),
        (lambda c: c.plan("greedy"), "no such policy"),
    ],
)
def test_a_wrong_order_is_one_line_and_changes_nothing(start, order, complaint) -> None:
    cluster = start(2, policy="static")
    before = cluster.controller.current(0.0)
    with pytest.raises((ResourceError, ConfigError)) as caught:
        order(cluster.controller)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
    assert cluster.controller.current(0.0).replicas == before.replicas


def test_too_few_slots_are_refused_before_anything_moves(start) -> None:
    cluster = start(2, slots=2)
    with pytest.raises(ResourceError, match=r"scale: 1 expert actors of 2 slots .* are 2 slots short of its 4 experts"):
        cluster.controller.scale(1)
    failed = ended(cluster, cluster.controller.place(ExpertId(layer=0, index=0), ["expert-1"]))
    assert failed.phase is OperationPhase.FAILED and "all 2 slots of layer 0 on expert-1 are taken" in failed.detail
    assert actors_of(cluster, 0, 0) == ["expert-0"]
