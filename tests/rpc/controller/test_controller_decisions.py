"""A controller's own decisions while its cluster serves, over real gRPC: the router must not notice."""

import time

from moecluster.types import ExpertId, LoadSnapshot, OperationKind, OperationPhase
from tests.support.clusters.changing_cluster import Traffic, actors_of, assert_whole, held, wait_for_calls
from tests.support.models.weight_versions import done
from tests.support.waiting import wait_until


def test_a_node_that_ray_takes_away_is_drained_by_itself(start) -> None:
    cluster = start(3)
    with Traffic(cluster):
        cluster.draining.add("node-of-expert-2")
        wait_until(lambda: "expert-2" not in cluster.services)
        wait_until(lambda: [o.phase for o in cluster.controller.operations(0)] == [OperationPhase.DONE])
        assert [o.kind for o in cluster.controller.operations(0)] == [OperationKind.DRAIN]
        assert_whole(cluster)


def test_a_node_that_goes_does_not_wait_behind_a_scale_that_waits(start, monkeypatch) -> None:
    cluster = start(3)
    monkeypatch.setattr(cluster, "create", lambda actor, *, avoid_nodes=(): None)  # like a full Ray cluster
    with Traffic(cluster):
        scale = cluster.controller.scale(4)
        wait_until(lambda: "expert-3 does not serve yet" in cluster.controller.operation(scale.id).detail)
        cluster.draining.add("node-of-expert-2")
        wait_until(lambda: "expert-2" not in cluster.services)
        assert not cluster.controller.operation(scale.id).phase.ended
        assert_whole(cluster)
    assert [o.kind for o in cluster.controller.operations(0)].count(OperationKind.DRAIN) == 1


def test_a_drain_that_ray_asked_for_and_that_failed_is_not_ordered_again(start, monkeypatch) -> None:
    cluster = start(2, slots=2, operation_timeout_s=0.5)
    monkeypatch.setattr(cluster, "create", lambda actor, *, avoid_nodes=(): None)
    with Traffic(cluster):
        cluster.draining.add("node-of-expert-1")
        wait_until(lambda: any(o.phase is OperationPhase.FAILED for o in cluster.controller.operations(0)))
        time.sleep(1.0)  # twenty rounds
    assert [o.kind for o in cluster.controller.operations(0)].count(OperationKind.DRAIN) == 1
    assert_whole(cluster)


def test_a_cold_expert_is_loaded_when_a_token_wants_it(start) -> None:
    cluster = start(2, policy="static")
    with Traffic(cluster) as traffic:
        for _ in range(3):
            done(cluster, cluster.controller.place(ExpertId(layer=0, index=2), []))
            wait_for_calls(traffic, traffic.calls + 3)
            wait_until(lambda: len(actors_of(cluster, 0, 2)) == 1)
    assert [o.kind for o in cluster.controller.operations(0)].count(OperationKind.ACTIVATE) >= 3


def test_experts_that_nobody_wants_are_unloaded_and_come_back(start) -> None:
    cluster = start(2, scale_to_zero_after_s=0.5)

    def report(*indices: int) -> None:
        tokens = {ExpertId(layer=0, index=index): 10 for index in indices}
        cluster.controller.report_load("router", LoadSnapshot(tokens=tokens))

    def only_two_are_left() -> bool:
        report(0, 1)
        return not actors_of(cluster, 0, 2) and not actors_of(cluster, 0, 3)

    # If the cluster starts slowly, these are unloaded too, before anyone reports.
    cluster.controller.want_experts("router", [ExpertId(layer=0, index=index) for index in (0, 1)])
    wait_until(only_two_are_left)
    wait_until(lambda: bool(actors_of(cluster, 0, 0)) and bool(actors_of(cluster, 0, 1)))
    with Traffic(cluster) as traffic:
        wait_until(lambda: bool(actors_of(cluster, 0, 2)) and bool(actors_of(cluster, 0, 3)))
        wait_until(lambda: traffic.calls > 5, "traffic")


def test_hot_experts_are_spread_and_the_gain_is_measured(start) -> None:
    cluster = start(2)
    tokens = {ExpertId(layer=0, index=i): n for i, n in enumerate((500, 400, 10, 5))}  # the hot ones on one actor

    def gain_is_measured() -> bool:
        cluster.controller.report_load("router", LoadSnapshot(tokens=tokens))
        measured = [
            o.balancedness_measured for o in cluster.controller.operations(0) if o.kind is OperationKind.REBALANCE
        ]
        return any(m is not None and m > 0.9 for m in measured)

    wait_until(gain_is_measured)
    rebalance = next(
        o for o in cluster.controller.operations(0) if o.kind is OperationKind.REBALANCE and o.balancedness_measured
    )
    assert rebalance.balancedness_before < 0.8 < rebalance.balancedness_predicted, "the mean of two layers, one idle"
    assert_whole(cluster)


def test_lost_experts_are_loaded_elsewhere_at_once_where_slots_are_free(start) -> None:
    cluster = start(2)
    with Traffic(cluster):
        lost = set(cluster.controller.current(0.0).experts_on("expert-1"))
        cluster.kill("expert-1")
        wait_until(lambda: lost <= held(cluster, "expert-0"))
        cluster.revive("expert-1")
        wait_until(lambda: "expert-1" in cluster.controller.current(0.0).actors)
        wait_until(lambda: cluster.controller.status().operations == ())
    kinds = [o.kind for o in cluster.controller.operations(0)]
    assert OperationKind.RESTORE in kinds


def test_experts_that_were_unloaded_on_purpose_stay_so_under_every_policy(start) -> None:
    cluster = start(2)
    cold = ExpertId(layer=0, index=3)
    done(cluster, cluster.controller.place(cold, []))
    tokens = {ExpertId(layer=layer, index=i): n for layer in (0, 1) for i, n in enumerate((500, 400, 10))}

    def rebalanced() -> bool:
        cluster.controller.report_load("router", LoadSnapshot(tokens=tokens))
        return any(
            o.kind is OperationKind.REBALANCE and o.phase is OperationPhase.DONE
            for o in cluster.controller.operations(0)
        )

    wait_until(rebalanced)
    done(cluster, cluster.controller.scale(3))
    assert cluster.controller.current(0.0).replicas_of(cold) == ()
    for policy in ("share", "eplb", "static"):
        assert all(r.expert != cold for r in cluster.controller.plan(policy).added), policy


def test_a_new_controller_decides_nothing_before_it_has_heard_from_the_routers(start) -> None:
    cluster = start(2, quiet_s=3.0)
    began_s = cluster.controller.started_s
    tokens = {ExpertId(layer=0, index=i): n for i, n in enumerate((500, 400, 10, 5))}

    def rebalanced() -> bool:
        cluster.controller.report_load("router", LoadSnapshot(tokens=tokens))
        return any(o.kind is OperationKind.REBALANCE for o in cluster.controller.operations(0))

    wait_until(rebalanced)
    assert time.monotonic() - began_s > 3.0


def test_a_plan_says_what_would_be_done_and_does_nothing(start) -> None:
    cluster = start(2, policy="static")
    before = cluster.controller.current(0.0)
    tokens = {ExpertId(layer=0, index=i): n for i, n in enumerate((500, 400, 10, 5))}

    def seen() -> bool:
        cluster.controller.report_load("router", LoadSnapshot(tokens=tokens))
        before = cluster.controller.plan("share").balancedness_before
        return before is not None and before < 0.9

    wait_until(seen)
    plan = cluster.controller.plan("share")
    assert plan.balancedness_after > plan.balancedness_before and plan.added and plan.moved_bytes > 0
    assert cluster.controller.current(0.0).replicas == before.replicas
