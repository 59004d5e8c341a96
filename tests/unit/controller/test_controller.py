"""A controller from its start on: what routers see of its actors, and how it recovers a lost one."""

from pathlib import Path

import pytest

from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.errors import CheckpointError, ResourceError, Unavailable, UserError
from moecluster.metrics import Metrics
from moecluster.placement.initial import contiguous_placement
from moecluster.types import ActorPhase, ExpertId, LoadSnapshot, PlacementNumber, Replica
from tests.support.clusters.controllers import ACTORS, LAYER_EXPERTS, wait_for_placement
from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.waiting import WAIT_S, wait_until


def test_the_first_placement_is_whole_and_its_experts_are_loaded(make, actors) -> None:
    controller = make()
    controller.start(WAIT_S)
    placement = controller.current(0.0)
    assert placement.number == (1, 1)
    assert placement.replicas == contiguous_placement(LAYER_EXPERTS, ACTORS)
    for name, service in actors.services.items():
        assert service.status().experts == placement.experts_on(name)
        assert service.incarnation == placement.actors[name].incarnation
    status = controller.status()
    assert {a.actor: (a.phase, a.experts, a.restarts) for a in status.actors} == dict.fromkeys(
        ACTORS, (ActorPhase.SERVING, 4, 0)
    )


def test_a_lost_actor_leaves_the_placement_and_comes_back_filled(make, actors, checkpoint) -> None:
    metrics = Metrics(model="tiny")
    controller = make(metrics=metrics)
    controller.start(WAIT_S)
    first = controller.current(0.0)
    actors.kill("expert-1")
    without = wait_for_placement(controller, lambda p: "expert-1" not in p.actors)
    assert without.number > first.number
    assert without.experts_on("expert-0") == first.experts_on("expert-0")
    assert without.layer_experts == first.layer_experts
    actors.revive("expert-1")
    back = wait_for_placement(controller, lambda p: "expert-1" in p.actors)
    assert back.replicas == first.replicas
    assert back.actors["expert-1"].incarnation != first.actors["expert-1"].incarnation
    assert actors.services["expert-1"].status().experts == first.experts_on("expert-1")
    assert sorted(actors.loads) == [(actor, checkpoint) for actor in ("expert-0", "expert-1", "expert-1")]
    shown = metrics.render()
    assert 'operations_total{cluster="",kind="restore",model="tiny",phase="done"} 1.0' in shown
    assert f'moecluster_placement_generation{{cluster="",model="tiny"}} {back.generation}.0' in shown


def test_replicas_that_are_left_take_the_whole_share(make, actors) -> None:
    both = tuple(
        Replica(expert=ExpertId(layer=layer, index=i), actor=actor, share=0.5)
        for layer in LAYER_EXPERTS
        for i in range(4)
        for actor in ACTORS
    )
    controller = make(replicas=both)
    controller.start(WAIT_S)
    assert controller.current(0.0).replicas == both
    actors.kill("expert-0")
    left = wait_for_placement(controller, lambda p: "expert-0" not in p.actors)
    assert {r.share for r in left.replicas} == {1.0}
    assert {r.actor for r in left.replicas} == {"expert-1"}


def test_a_lost_expert_is_loaded_from_the_checkpoint_that_training_moved_on_to(make, actors, tmp_path) -> None:
    controller = make()
    controller.start(WAIT_S)
    newer = save_tiny_model(tmp_path / "newer", seed=1)
    controller.set_checkpoint(newer)
    actors.kill("expert-0")
    actors.revive("expert-0")
    wait_until(lambda: ("expert-0", newer) in actors.loads)


def test_what_lost_experts_could_not_be_loaded_from_is_refused(make, actors, tmp_path) -> None:
    controller = make()
    controller.start(WAIT_S)
    before = controller.status()
    torn = Path(save_tiny_model(tmp_path / "torn"))
    next(torn.glob("*.safetensors")).unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for wrong in ("/nonexistent", "", "runs/step-1", str(torn), str(tmp_path / "empty"), str(tmp_path / "loop")):
        with pytest.raises(CheckpointError):
            controller.set_checkpoint(wrong)
    assert controller.status() == before


def test_an_actor_that_hangs_is_started_again(make, actors) -> None:
    controller = make()
    controller.start(WAIT_S)
    before = controller.current(0.0).actors["expert-1"].incarnation
    actors.hanging.add("expert-1")
    wait_for_placement(controller, lambda p: "expert-1" in p.actors and p.actors["expert-1"].incarnation != before)
    assert actors.restarted == ["expert-1"]
    assert controller.status().actors[1].restarts == 1


def test_a_router_counts_while_its_lease_lasts(make) -> None:
    now_s = [100.0]
    controller = make(clock=lambda: now_s[0], lease_s=10.0)
    controller.renew_lease("router-0", PlacementNumber(1, 1))
    now_s[0] += 6.0
    controller.renew_lease("router-1", PlacementNumber(1, 2))
    assert set(controller.leases()) == {"router-0", "router-1"}
    now_s[0] += 5.0
    assert {router: lease.applied for router, lease in controller.leases().items()} == {"router-1": (1, 2)}
    assert controller.status().routers == 1
    now_s[0] += 5.0
    assert controller.leases() == {}


def test_a_torn_checkpoint_ends_the_start_in_one_line(make, tmp_path: Path) -> None:
    torn = Path(save_tiny_model(tmp_path / "torn"))
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="torn") as caught:
        make(checkpoint=str(torn)).start(WAIT_S)
    assert "\n" not in str(caught.value)


def test_a_start_without_any_actor_ends_with_a_reason(make, actors) -> None:
    for name in ACTORS:
        actors.kill(name)
    with pytest.raises(ResourceError, match=r"no expert actor was ready within .* s; expert-[01] was not started"):
        make(start_timeout_s=0.1).start(1.0)


def test_one_actor_that_does_not_come_up_is_not_waited_for_and_joins_later(make, actors) -> None:
    actors.kill("expert-1")
    controller = make(start_timeout_s=0.1)
    controller.start(WAIT_S)
    assert set(controller.current(0.0).actors) == {"expert-0"}
    actors.revive("expert-1")
    wait_for_placement(controller, lambda p: set(p.actors) == set(ACTORS))


def test_reported_loads_show_as_balancedness(make) -> None:
    metrics = Metrics(model="tiny")
    controller = make(metrics=metrics, reconciler=ReconcilerSettings(policy="static", period_s=0.02))
    controller.start(WAIT_S)
    tokens = {ExpertId(layer=0, index=0): 30, ExpertId(layer=0, index=3): 10, ExpertId(layer=1, index=1): 5}

    def shown() -> bool:
        controller.report_load("router-0", LoadSnapshot(tokens=tokens))
        text = metrics.render()
        return (
            'layer_balancedness{cluster="",layer="0",model="tiny"} 0.6666' in text
            and 'layer_balancedness{cluster="",layer="1",model="tiny"} 0.5' in text
        )

    wait_until(shown)


def test_a_lost_actor_whose_checkpoint_is_gone_says_so_until_the_checkpoint_is_back(make, actors, tmp_path) -> None:
    """Routers do not wait for experts that cannot be loaded, and learn why."""
    served = Path(save_tiny_model(tmp_path / "served"))
    controller = make(checkpoint=str(served))
    controller.start(WAIT_S)
    served.rename(tmp_path / "gone")
    actors.kill("expert-1")
    without = wait_for_placement(controller, lambda p: "expert-1" not in p.actors)
    assert without.problem == "", "it may come back"
    actors.revive("expert-1")
    blocked = wait_for_placement(controller, lambda p: bool(p.problem))
    assert str(served) in blocked.problem and "expert-1" not in blocked.actors
    status = controller.status()
    assert status.lost_experts == 4
    assert {a.actor: str(served) in a.problem for a in status.actors} == {"expert-0": False, "expert-1": True}
    (tmp_path / "gone").rename(served)
    back = wait_for_placement(controller, lambda p: "expert-1" in p.actors and not p.problem)
    assert len(back.replicas) == len(without.replicas) + 4
    status = controller.status()
    assert status.lost_experts == 0 and not any(a.problem for a in status.actors)


def test_it_closes_before_it_ends_the_cluster_and_tries_again_when_asked(make, actors) -> None:
    ended: list[str] = []

    def end() -> None:
        ended.append("end")
        if len(ended) == 1:
            raise Unavailable("Ray does not say which actors there are")

    controller = make(end=end)
    controller.start(WAIT_S)
    controller.shut_down()
    wait_until(lambda: ended == ["end"], "the first attempt")
    assert controller.newer_than(controller.current(0.0).number, WAIT_S) is None, "it is closed, and nothing follows"

    def again() -> bool:
        controller.shut_down()  # which the failed attempt allows
        return len(ended) == 2

    wait_until(again, "the second attempt")
    with pytest.raises(ResourceError, match="are started and ended by other means"):
        make().shut_down()
