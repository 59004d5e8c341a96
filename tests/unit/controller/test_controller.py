import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moecluster.controller.controller import Controller
from moecluster.controller.rebalance.decide import Change, Planner
from moecluster.controller.rebalance.observe import ObserverSettings
from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.controller.settings import ControllerSettings
from moecluster.errors import CheckpointError, ResourceError, StaleRequest, UserError
from moecluster.metrics import Metrics
from moecluster.placement.initial import all_experts, contiguous_placement
from moecluster.placement.policy.static import StaticPolicy
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.types import ExpertId, LoadSnapshot, Operation, OperationPhase, Placement, PlacementNumber, Replica
from tests.support.clusters.fake_actors import FakeActors, save_tiny_model
from tests.support.clusters.given import any_directory

ACTORS = ("expert-0", "expert-1")
LAYER_EXPERTS = {0: 4, 1: 4}
WAIT_S = 60.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def actors() -> Iterator[FakeActors]:
    with FakeActors(ACTORS) as fakes:
        yield fakes


@pytest.fixture
def make(actors: FakeActors, checkpoint: str) -> Iterator[Callable[..., Controller]]:
    """Makes controllers over the twins, and closes them."""
    made: list[Controller] = []

    def make_controller(**changes: Any) -> Controller:
        settings: dict[str, Any] = {
            "actors": ACTORS,
            "replicas": contiguous_placement(LAYER_EXPERTS, ACTORS),
            "layer_experts": LAYER_EXPERTS,
            "checkpoint": checkpoint,
            "health_period_s": 0.05,
            "start_timeout_s": 0.5,
        }
        others: dict[str, Any] = {"metrics": Metrics(model="tiny")}
        for key, value in changes.items():
            (settings if key in ControllerSettings.__dataclass_fields__ else others)[key] = value
        controller = Controller(
            ControllerSettings(**settings),
            is_given=any_directory,
            supervisor=actors,
            connect=actors.connect,
            watch=actors.watch,
            **others,
        )
        made.append(controller)
        return controller

    yield make_controller
    for controller in made:
        controller.close()


def wait_for(controller: Controller, condition: Callable[[Placement], bool]) -> Placement:
    deadline_s = time.monotonic() + WAIT_S
    placement = controller.current(WAIT_S)
    while not condition(placement):
        newer = controller.newer_than(placement.number, deadline_s - time.monotonic())
        assert newer is not None, f"the placement stayed {placement}"
        placement = newer
    return placement


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.01)


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
        ACTORS, ("serving", 4, 0)
    )


def test_a_lost_actor_leaves_the_placement_and_comes_back_filled(make, actors, checkpoint) -> None:
    metrics = Metrics(model="tiny")
    controller = make(metrics=metrics)
    controller.start(WAIT_S)
    first = controller.current(0.0)
    actors.kill("expert-1")
    without = wait_for(controller, lambda p: "expert-1" not in p.actors)
    assert without.number > first.number
    assert without.experts_on("expert-0") == first.experts_on("expert-0")
    assert without.layer_experts == first.layer_experts
    actors.revive("expert-1")
    back = wait_for(controller, lambda p: "expert-1" in p.actors)
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
    left = wait_for(controller, lambda p: "expert-0" not in p.actors)
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


def test_a_successor_keeps_what_is_loaded_and_reads_the_snapshot_back(make, actors, tmp_path) -> None:
    newer = save_tiny_model(tmp_path / "newer", seed=1)
    first = make()
    first.start(WAIT_S)
    first.set_checkpoint(newer)
    number = first.current(0.0).number
    wait_until(lambda: all(s.status().placement == number for s in actors.services.values()))
    first.close()
    loads = list(actors.loads)

    second = make()
    second.start(WAIT_S)
    assert second.current(0.0).number == (2, number[1] + 1)
    assert second.status().checkpoint == newer
    assert actors.loads == loads


def test_what_a_successor_does_not_know_of_serves_on_until_routers_know_better(make, actors, checkpoint) -> None:
    """Its predecessor died between a move and the snapshot of it: routers go by the placement after the move."""
    first = make()
    first.start(WAIT_S)
    number = first.current(0.0).number
    wait_until(lambda: all(s.status().placement == number for s in actors.services.values()))
    first.close()
    moved = ExpertId(layer=0, index=0)
    actors.services["expert-1"].load(LoadRequest(term=1, experts=(moved,), checkpoint=checkpoint))
    actors.services["expert-0"].unload(term=1, experts=[moved])

    second = make(lease_s=0.5)
    second.start(WAIT_S)
    assert moved in actors.services["expert-0"].status().experts, "the snapshot says so"
    assert moved in actors.services["expert-1"].status().experts, "routers may not know yet"
    wait_until(lambda: moved not in actors.services["expert-1"].status().experts)


def test_a_successor_waits_for_no_actor_that_is_down(make, actors) -> None:
    first = make()
    first.start(WAIT_S)
    number = first.current(0.0).number
    wait_until(lambda: all(s.status().placement == number for s in actors.services.values()))
    first.close()
    actors.kill("expert-1")
    second = make(start_timeout_s=WAIT_S)
    began_s = time.monotonic()
    second.start(WAIT_S)
    assert set(second.current(0.0).actors) == {"expert-0"}
    assert time.monotonic() - began_s < WAIT_S / 2
    actors.revive("expert-1")
    wait_for(second, lambda p: set(p.actors) == set(ACTORS))


def test_a_successor_that_finds_every_actor_down_waits_for_them(make, actors) -> None:
    first = make()
    first.start(WAIT_S)
    actors.kill("expert-0")
    number = first.current(0.0).number
    wait_until(lambda: actors.services["expert-1"].status().placement >= number)
    first.close()
    second = make()
    threading.Timer(0.5, lambda: actors.kill("expert-1")).start()
    second.start(WAIT_S)
    actors.revive("expert-0")
    actors.revive("expert-1")
    assert set(wait_for(second, lambda p: set(p.actors) == set(ACTORS)).actors) == set(ACTORS)


def test_a_deposed_controller_is_refused_and_says_so(make, actors, tmp_path) -> None:
    deposed = threading.Event()
    first = make(on_deposed=deposed.set)
    first.start(WAIT_S)
    second = make()
    second.start(WAIT_S)
    first.set_checkpoint(save_tiny_model(tmp_path / "newer", seed=1))  # makes it give an order
    assert deposed.wait(WAIT_S)
    wait_until(lambda: all(s.status().placement.term == 2 for s in actors.services.values()))
    assert {s.status().checkpoint for s in actors.services.values()} == {second.status().checkpoint}
    with pytest.raises(StaleRequest):
        actors.services["expert-0"].unload(term=1, experts=[ExpertId(layer=0, index=0)])


def test_an_actor_that_hangs_is_started_again(make, actors) -> None:
    controller = make()
    controller.start(WAIT_S)
    before = controller.current(0.0).actors["expert-1"].incarnation
    actors.hanging.add("expert-1")
    wait_for(controller, lambda p: "expert-1" in p.actors and p.actors["expert-1"].incarnation != before)
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
    wait_for(controller, lambda p: set(p.actors) == set(ACTORS))


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


def static(slots: int = 2) -> dict[str, Any]:
    """Settings of a controller that changes what is ordered, and nothing else."""
    return {
        "observer": ObserverSettings(slots_per_layer=slots),
        "changer": ReconcilerSettings(policy="static", period_s=0.02),
    }


def wait_ended(controller: Controller, operation: Operation) -> Operation:
    wait_until(lambda: controller.operation(operation.id).phase.ended)
    return controller.operation(operation.id)


def test_a_change_of_a_layer_leaves_what_a_lost_actor_shall_hold_as_it_was(make, actors) -> None:
    controller = make(**static())
    controller.start(WAIT_S)
    actors.kill("expert-1")
    wait_for(controller, lambda p: "expert-1" not in p.actors)
    cold, kept = ExpertId(layer=0, index=0), ExpertId(layer=0, index=2)
    assert wait_ended(controller, controller.place(cold, [])).phase is OperationPhase.DONE
    actors.revive("expert-1")
    back = wait_for(controller, lambda p: "expert-1" in p.actors)
    assert [r.actor for r in back.replicas_of(kept)] == ["expert-1"], "once"
    assert back.replicas_of(cold) == ()


def test_an_expert_that_is_placed_elsewhere_does_not_come_back_with_the_actor_that_had_it(make, actors) -> None:
    controller = make(**static(slots=3))
    controller.start(WAIT_S)
    placed = ExpertId(layer=0, index=2)
    assert wait_ended(controller, controller.place(placed, ["expert-0", "expert-1"])).phase is OperationPhase.DONE
    actors.kill("expert-1")
    wait_for(controller, lambda p: "expert-1" not in p.actors)
    assert wait_ended(controller, controller.place(placed, ["expert-0"])).phase is OperationPhase.DONE
    actors.revive("expert-1")
    back = wait_for(controller, lambda p: "expert-1" in p.actors)
    assert [r.actor for r in back.replicas_of(placed)] == ["expert-0"]


def test_an_error_of_a_policy_ends_neither_the_operation_nor_the_thread_that_changes_things(make, monkeypatch) -> None:
    controller = make(**static(slots=4))
    controller.start(WAIT_S)

    def broken(*_: Any) -> None:
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(StaticPolicy, "decide", broken)
    failed = wait_ended(controller, controller.scale(2))
    assert failed.phase is OperationPhase.FAILED and "its log says how" in failed.detail
    done = wait_ended(controller, controller.place(ExpertId(layer=0, index=0), ["expert-1"]))
    assert done.phase is OperationPhase.DONE


def test_an_order_that_failed_for_a_lost_actor_is_tried_again_though_it_is_back_by_then(
    make, actors, monkeypatch
) -> None:
    controller = make(**static(slots=4), min_actors=1)
    controller.start(WAIT_S)
    actors.kill("expert-0")
    wait_for(controller, lambda p: "expert-0" not in p.actors)
    fill = Planner.fill

    def fail_and_wait(self: Planner) -> Change:
        try:
            return fill(self)
        except ResourceError:
            actors.revive("expert-0")
            wait_for(controller, lambda p: "expert-0" in p.actors)
            raise

    monkeypatch.setattr(Planner, "fill", fail_and_wait)
    assert wait_ended(controller, controller.scale(1)).phase is OperationPhase.DONE


def test_a_size_that_is_ordered_while_an_actor_is_lost_comes_when_it_is_back(make, actors) -> None:
    controller = make(**static(slots=4), min_actors=1)
    controller.start(WAIT_S)
    actors.kill("expert-0")
    wait_for(controller, lambda p: "expert-0" not in p.actors)
    operation = controller.scale(1)
    wait_until(lambda: "waits: " in controller.operation(operation.id).detail)
    actors.revive("expert-0")
    assert wait_ended(controller, operation).phase is OperationPhase.DONE
    assert set(controller.current(0.0).actors) == {"expert-0"}
    assert set(controller.current(0.0).experts_on("expert-0")) == set(all_experts(LAYER_EXPERTS))


def test_a_size_that_cannot_be_leaves_the_actors_as_they_were(make, actors) -> None:
    settings = static(slots=4)
    settings["changer"] = ReconcilerSettings(policy="static", period_s=0.02, operation_timeout_s=0.3)
    controller = make(**settings)
    controller.start(WAIT_S)
    actors.kill("expert-0")
    wait_for(controller, lambda p: "expert-0" not in p.actors)
    assert wait_ended(controller, controller.scale(1)).phase is OperationPhase.FAILED
    actors.revive("expert-0")
    back = wait_for(controller, lambda p: "expert-0" in p.actors)
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
    wait_for(controller, lambda p: len(p.replicas_of(cold)) == 1)
    assert not controller.operation(grow.id).phase.ended and not controller.operation(shrink.id).phase.ended
    actors.revive("expert-2")
    assert wait_ended(controller, grow).phase is OperationPhase.DONE
    assert wait_ended(controller, shrink).phase is OperationPhase.DONE
    assert set(controller.current(0.0).actors) == {"expert-0"}


def test_a_lost_actor_whose_checkpoint_is_gone_says_so_until_the_checkpoint_is_back(make, actors, tmp_path) -> None:
    """Routers need not wait for experts that cannot be loaded, and are told why."""
    served = Path(save_tiny_model(tmp_path / "served"))
    controller = make(checkpoint=str(served))
    controller.start(WAIT_S)
    served.rename(tmp_path / "gone")
    actors.kill("expert-1")
    without = wait_for(controller, lambda p: "expert-1" not in p.actors)
    assert without.problem == "", "it may come back"
    actors.revive("expert-1")
    blocked = wait_for(controller, lambda p: bool(p.problem))
    assert str(served) in blocked.problem and "expert-1" not in blocked.actors
    status = controller.status()
    assert status.lost_experts == 4
    assert {a.actor: str(served) in a.problem for a in status.actors} == {"expert-0": False, "expert-1": True}
    (tmp_path / "gone").rename(served)
    back = wait_for(controller, lambda p: "expert-1" in p.actors and not p.problem)
    assert len(back.replicas) == len(without.replicas) + 4
    status = controller.status()
    assert status.lost_experts == 0 and not any(a.problem for a in status.actors)
