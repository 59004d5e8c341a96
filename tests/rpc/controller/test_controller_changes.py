"""What a controller changes while its cluster serves: over real gRPC, with a router that must not notice."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from moecluster.controller.rebalance.apply import ApplierSettings
from moecluster.controller.rebalance.observe import ObserverSettings
from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.errors import ConfigError, ResourceError
from moecluster.types import NO_PLACEMENT, ExpertId, LoadSnapshot, Operation, OperationPhase
from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.clusters.loopback_cluster import LoopbackCluster

WAIT_S = 60.0
SLOTS = 4  # of each layer, whose experts are 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(checkpoint: str) -> Iterator[Callable[..., LoopbackCluster]]:
    """Starts clusters, and ends them."""
    started: list[LoopbackCluster] = []

    def start_cluster(
        num_actors: int = 2, *, slots: int = SLOTS, batch_invariant: bool = False, **reconciler: Any
    ) -> LoopbackCluster:
        settings: dict[str, Any] = {"policy": "share", "period_s": 0.05, "operation_timeout_s": 10.0, **reconciler}
        cluster = LoopbackCluster(
            checkpoint,
            num_actors=num_actors,
            batch_invariant=batch_invariant,
            observer=ObserverSettings(window="sliding", window_s=2.0, slots_per_layer=slots),
            reconciler=ReconcilerSettings(**settings),
            applier=ApplierSettings(drain_timeout_s=2.0),
        )
        started.append(cluster)
        return cluster

    yield start_cluster
    for cluster in started:
        cluster.__exit__()


class Traffic:
    """One layer called over and over in a thread; every answer must be the first one, within rounding or exactly."""

    def __init__(self, cluster: LoopbackCluster, *, exactly: bool = False) -> None:
        self._tolerance = 0.0 if exactly else 1e-5
        generator = torch.Generator().manual_seed(0)
        self._x_TD = torch.randn(24, 32, generator=generator)
        self._ids_TK = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(24)])
        self._weights_TK = torch.rand(24, 2, generator=generator)
        self._cluster = cluster
        self._first_TD = self._call()
        self.calls = 0
        self.failures: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _call(self) -> torch.Tensor:
        return self._cluster.remote(0, self._x_TD, self._ids_TK, self._weights_TK)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                y_TD = self._call()
                if not torch.allclose(y_TD, self._first_TD, rtol=self._tolerance, atol=self._tolerance):
                    self.failures.append("another answer")
            except Exception as exc:
                self.failures.append(repr(exc))
            self.calls += 1

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(WAIT_S)
        assert not self.failures, self.failures[:3]
        assert self.calls > 3


def wait_until(condition: Callable[[], bool], what: str = "it") -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not come true"
        time.sleep(0.02)


def wait_for_calls(traffic: Traffic, calls: int) -> None:
    wait_until(lambda: traffic.calls >= calls)


def ended(cluster: LoopbackCluster, operation: Operation) -> Operation:
    wait_until(lambda: cluster.controller.operation(operation.id).phase.ended, str(operation))
    return cluster.controller.operation(operation.id)


def done(cluster: LoopbackCluster, operation: Operation) -> Operation:
    finished = ended(cluster, operation)
    assert finished.phase is OperationPhase.DONE, finished
    return finished


def actors_of(cluster: LoopbackCluster, layer: int, index: int) -> list[str]:
    placement = cluster.controller.current(0.0)
    return [r.actor for r in placement.replicas_of(ExpertId(layer=layer, index=index))]


def standing_on(cluster: LoopbackCluster, actor: str) -> set[ExpertId]:
    return set(cluster.controller.current(0.0).experts_on(actor))


def held(cluster: LoopbackCluster, actor: str) -> set[ExpertId]:
    return set(cluster.services[actor].status().experts)


def assert_whole(cluster: LoopbackCluster) -> None:
    """Every expert stands somewhere, actors hold what the placement says once all is unloaded, shares sum to 1."""
    placement = cluster.controller.current(0.0)
    for layer, count in placement.layer_experts.items():
        for index in range(count):
            replicas = placement.replicas_of(ExpertId(layer=layer, index=index))
            assert sum(r.share for r in replicas) == pytest.approx(1.0), (layer, index)
    wait_until(lambda: all(held(cluster, a) == standing_on(cluster, a) for a in placement.actors))


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
    assert len([o for o in cluster.controller.operations(0) if o.kind == "scale"]) == 1
    with pytest.raises(ResourceError, match="grow is scale 3 already"):
        cluster.controller.scale(2, operation_id="grow")


def test_a_drained_node_is_emptied_and_its_actor_ended(start) -> None:
    cluster = start(3)
    with Traffic(cluster):
        done(cluster, cluster.controller.drain("node-of-expert-1"))
        assert set(cluster.controller.current(0.0).actors) == {"expert-0", "expert-2"}
        assert_whole(cluster)


def test_a_node_that_ray_takes_away_is_drained_by_itself(start) -> None:
    cluster = start(3)
    with Traffic(cluster):
        cluster.draining.add("node-of-expert-2")
        wait_until(lambda: "expert-2" not in cluster.services)
        wait_until(lambda: [o.phase for o in cluster.controller.operations(0)] == [OperationPhase.DONE])
        assert [o.kind for o in cluster.controller.operations(0)] == ["drain"]
        assert_whole(cluster)


def test_a_node_that_goes_does_not_wait_behind_a_scale_that_waits(start, monkeypatch) -> None:
    cluster = start(3)
    monkeypatch.setattr(cluster, "create", lambda actor, *, avoid_nodes=(): None)  # as a Ray cluster without room
    with Traffic(cluster):
        scale = cluster.controller.scale(4)
        wait_until(lambda: "expert-3 does not serve yet" in cluster.controller.operation(scale.id).detail)
        cluster.draining.add("node-of-expert-2")
        wait_until(lambda: "expert-2" not in cluster.services)
        assert not cluster.controller.operation(scale.id).phase.ended
        assert_whole(cluster)
    assert [o.kind for o in cluster.controller.operations(0)].count("drain") == 1


def test_a_drain_that_ray_asked_for_and_that_failed_is_not_ordered_again(start, monkeypatch) -> None:
    cluster = start(2, slots=2, operation_timeout_s=0.5)
    monkeypatch.setattr(cluster, "create", lambda actor, *, avoid_nodes=(): None)
    with Traffic(cluster):
        cluster.draining.add("node-of-expert-1")
        wait_until(lambda: any(o.phase is OperationPhase.FAILED for o in cluster.controller.operations(0)))
        time.sleep(1.0)  # twenty rounds
    assert [o.kind for o in cluster.controller.operations(0)].count("drain") == 1
    assert_whole(cluster)


def test_an_expert_is_placed_by_hand_on_exactly_these_actors(start) -> None:
    cluster = start(3, policy="static")
    with Traffic(cluster):
        done(cluster, cluster.controller.place(ExpertId(layer=0, index=1), ["expert-0", "expert-2"]))
        assert actors_of(cluster, 0, 1) == ["expert-0", "expert-2"]
        done(cluster, cluster.controller.place(ExpertId(layer=0, index=1), ["expert-1"]))
        assert actors_of(cluster, 0, 1) == ["expert-1"]
        assert_whole(cluster)


def test_a_cold_expert_is_loaded_when_a_token_wants_it(start) -> None:
    cluster = start(2, policy="static")
    with Traffic(cluster) as traffic:
        for _ in range(3):
            done(cluster, cluster.controller.place(ExpertId(layer=0, index=2), []))
            wait_for_calls(traffic, traffic.calls + 3)
            wait_until(lambda: len(actors_of(cluster, 0, 2)) == 1)
    assert [o.kind for o in cluster.controller.operations(0)].count("wake") >= 3


def test_experts_that_nobody_wants_are_unloaded_and_come_back(start) -> None:
    cluster = start(2, scale_to_zero_after_s=0.5)

    def report(*indices: int) -> None:
        tokens = {ExpertId(layer=0, index=index): 10 for index in indices}
        cluster.controller.report_load("router", LoadSnapshot(tokens=tokens))

    def only_two_are_left() -> bool:
        report(0, 1)
        return not actors_of(cluster, 0, 2) and not actors_of(cluster, 0, 3)

    # A cluster that takes long to start has unloaded these, too, before anybody reports.
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
        measured = [o.balancedness_measured for o in cluster.controller.operations(0) if o.kind == "rebalance"]
        return any(m is not None and m > 0.9 for m in measured)

    wait_until(gain_is_measured)
    rebalance = next(o for o in cluster.controller.operations(0) if o.kind == "rebalance" and o.balancedness_measured)
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
    assert "restore" in kinds


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


def test_experts_that_were_unloaded_on_purpose_stay_so_under_every_policy(start) -> None:
    cluster = start(2)
    cold = ExpertId(layer=0, index=3)
    done(cluster, cluster.controller.place(cold, []))
    tokens = {ExpertId(layer=layer, index=i): n for layer in (0, 1) for i, n in enumerate((500, 400, 10))}

    def rebalanced() -> bool:
        cluster.controller.report_load("router", LoadSnapshot(tokens=tokens))
        return any(o.kind == "rebalance" and o.phase is OperationPhase.DONE for o in cluster.controller.operations(0))

    wait_until(rebalanced)
    done(cluster, cluster.controller.scale(3))
    assert cluster.controller.current(0.0).replicas_of(cold) == ()
    for policy in ("share", "eplb", "static"):
        assert all(r.expert != cold for r in cluster.controller.plan(policy).added), policy


def test_a_new_controller_decides_nothing_before_it_has_heard_from_the_routers(start) -> None:
    cluster = start(2, quiet_s=3.0)
    began_s = cluster.controller._reconciler._started_s
    tokens = {ExpertId(layer=0, index=i): n for i, n in enumerate((500, 400, 10, 5))}

    def rebalanced() -> bool:
        cluster.controller.report_load("router", LoadSnapshot(tokens=tokens))
        return any(o.kind == "rebalance" for o in cluster.controller.operations(0))

    wait_until(rebalanced)
    assert time.monotonic() - began_s > 3.0


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
