import dataclasses

import pytest

from moecluster.controller.state.cluster_state import Standing
from moecluster.controller.state.placement_state import with_whole_shares
from moecluster.controller.state.weight_versions import StandingVersions
from moecluster.metrics import Metrics
from moecluster.placement.initial import contiguous_placement
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import ActorAddress, ExpertId, Replica, WeightVersion

LAYER_EXPERTS = {0: 2, 3: 2}
ACTORS = ("expert-0", "expert-1")


def expert(layer: int, index: int) -> ExpertId:
    return ExpertId(layer=layer, index=index)


def address(actor: str, life: str = "a") -> ActorAddress:
    return ActorAddress(actor=actor, address="127.0.0.1:1", incarnation=life)


@pytest.fixture
def board() -> PlacementBoard:
    return PlacementBoard()


@pytest.fixture
def standing(board: PlacementBoard) -> Standing:
    standing = Standing(LAYER_EXPERTS, board=board, metrics=Metrics(model="tiny"))
    standing.begin(
        term=7,
        generation=3,
        versions=StandingVersions.only(WeightVersion(version=1, checkpoint="/m")),
        actors=ACTORS,
        replicas=contiguous_placement(LAYER_EXPERTS, ACTORS),
    )
    return standing


def bring_up(standing: Standing) -> None:
    for actor in ACTORS:
        standing.actor_up(address(actor), standing.assigned(actor))
    standing.open()


def test_nothing_is_seen_before_it_is_opened(standing, board) -> None:
    standing.actor_up(address("expert-0"), standing.assigned("expert-0"))
    assert board.number == (0, 0)
    standing.open()
    placement = board.current(0.0)
    assert placement.number == (7, 4)
    assert {r.actor for r in placement.replicas} == {"expert-0"}


def test_an_actor_serves_only_what_it_holds(standing, board) -> None:
    bring_up(standing)
    standing.actor_down("expert-1")
    assert standing.lost() == {expert(0, 1), expert(3, 1)}
    standing.actor_up(address("expert-1", "b"), [expert(0, 1)])
    assert standing.lost() == {expert(3, 1)}
    assert board.current(0.0).experts_on("expert-1") == (expert(0, 1),)


def test_a_committed_layer_stands_and_an_expert_without_a_replica_is_cold(standing, board) -> None:
    bring_up(standing)
    both = (
        Replica(expert=expert(3, 0), actor="expert-0", share=0.25),
        Replica(expert=expert(3, 0), actor="expert-1", share=0.75),
    )
    number = standing.commit({3: both}, {"expert-1": frozenset([expert(3, 0)])})
    placement = board.current(0.0)
    assert placement.number == number
    assert tuple(r for r in placement.replicas if r.expert.layer == 3) == both
    assert standing.cold == {expert(3, 1)} and standing.lost() == frozenset()
    assert standing.assigned("expert-1") == {expert(0, 1), expert(3, 0)}


def test_what_is_prepared_is_kept_though_it_does_not_stand(standing) -> None:
    bring_up(standing)
    standing.prepare("expert-0", [expert(3, 1)])
    assert expert(3, 1) in standing.kept("expert-0") and expert(3, 1) not in standing.assigned("expert-0")
    standing.prepared("expert-0", [expert(3, 1)])
    assert standing.kept("expert-0") == standing.assigned("expert-0")


def test_a_look_at_the_same_life_forgets_nothing_that_it_was_given(standing) -> None:
    bring_up(standing)
    moved = dataclasses.replace(standing.replicas_of(3)[1], actor="expert-0")
    standing.commit({3: (standing.replicas_of(3)[0], moved)}, {"expert-0": frozenset([expert(3, 1)])})
    standing.actor_up(address("expert-0"), [expert(0, 0), expert(3, 0)])
    assert expert(3, 1) in standing.up()["expert-0"].held
    standing.actor_up(address("expert-0", "another life"), [expert(0, 0)])
    assert standing.up()["expert-0"].held == {expert(0, 0)}


def test_a_removed_actor_leaves_nothing(standing, board) -> None:
    bring_up(standing)
    standing.set_leaving(["expert-1"])
    standing.remove_actor("expert-1")
    assert standing.actors == ("expert-0",) and standing.leaving == frozenset()
    assert set(board.current(0.0).actors) == {"expert-0"}
    standing.actor_up(address("expert-1"), [expert(0, 1)])
    assert set(standing.up()) == {"expert-0"}, "its keeper was slow to hear of it"
    assert standing.lost() == {expert(0, 1), expert(3, 1)}, "removed too early, its experts would be lost, not cold"


def test_shares_are_made_whole() -> None:
    replicas = (
        Replica(expert=expert(0, 0), actor="expert-0", share=0.2),
        Replica(expert=expert(0, 0), actor="expert-1", share=0.2),
        Replica(expert=expert(0, 1), actor="expert-0", share=0.0),
        Replica(expert=expert(0, 1), actor="expert-1", share=0.0),
    )
    assert [r.share for r in with_whole_shares(replicas)] == [0.5, 0.5, 0.5, 0.5]


def prepare_all(standing: Standing, version: int) -> None:
    for actor in ACTORS:
        standing.actor_prepared(address(actor), version, standing.assigned(actor))


def test_a_version_is_published_once_every_actor_that_is_up_holds_it(standing, board) -> None:
    bring_up(standing)
    assert (board.current(0.0).weight_version, board.current(0.0).checkpoint) == (1, "/m")
    version = standing.begin_version("/n")
    placement = board.current(0.0)
    assert (placement.weight_version, placement.next_weight_version, placement.next_checkpoint) == (1, 2, "/n")
    assert placement.old_weight_version == 0
    assert standing.versions.written_with == standing.versions.all[:1] and standing.versions.next == version
    standing.actor_prepared(address("expert-0"), 2, standing.assigned("expert-0"))
    assert standing.publish_version() is None and standing.unprepared() == ["expert-1"]
    standing.actor_prepared(address("expert-1", "another life"), 2, standing.assigned("expert-1"))
    assert standing.unprepared() == ["expert-1"]
    standing.actor_down("expert-1")
    assert standing.publish_version() == standing.number, "a lost one comes back with both"
    placement = board.current(0.0)
    assert (placement.weight_version, placement.checkpoint, placement.next_weight_version) == (2, "/n", 0)
    assert placement.old_weight_version == 1
    assert [v.version for v in standing.versions.written_with] == [1, 2]
    standing.drop_other_versions()
    assert [v.version for v in standing.versions.all] == [2]


def test_an_actor_that_was_told_of_the_old_version_only_serves_nothing(standing) -> None:
    bring_up(standing)
    old = standing.versions.all
    standing.actor_down("expert-1")
    standing.begin_version("/n")
    standing.actor_prepared(address("expert-0"), 2, standing.assigned("expert-0"))
    assert standing.publish_version() is not None
    standing.actor_up(address("expert-1"), standing.assigned("expert-1"), versions=old)
    assert standing.up()["expert-1"].held == frozenset()
    standing.actor_up(address("expert-1"), standing.assigned("expert-1"), versions=standing.versions.all)
    assert standing.lost() == frozenset()


def test_experts_that_move_are_prepared_where_they_stand_now(standing) -> None:
    bring_up(standing)
    standing.begin_version("/n")
    prepare_all(standing, 2)
    assert standing.unprepared() == []
    moved = dataclasses.replace(standing.replicas_of(3)[1], actor="expert-0")
    standing.commit({3: (standing.replicas_of(3)[0], moved)}, {"expert-0": frozenset([expert(3, 1)])})
    assert standing.unprepared() == ["expert-0"]
    prepare_all(standing, 2)
    assert standing.unprepared() == []


def test_a_version_that_was_given_up_leaves_its_number_unused(standing, board) -> None:
    bring_up(standing)
    standing.begin_version("/torn")
    standing.drop_other_versions()
    assert board.current(0.0).next_weight_version == 0 and standing.versions.last_version == 2
    assert standing.begin_version("/n").version == 3
    standing.set_checkpoint("/trained")
    assert [v.checkpoint for v in standing.versions.all] == ["/trained", "/n"]


def test_a_placement_says_why_lost_experts_cannot_be_loaded_if_none_of_them_can(standing, board) -> None:
    bring_up(standing)
    standing.actor_down("expert-0")
    standing.actor_down("expert-1")
    standing.set_problem("expert-1", "/m: no such directory")
    assert board.current(0.0).problem == "", "expert-0 may come back at any moment"
    standing.set_problem("expert-0", "/m: no such directory")
    before = board.number
    standing.set_problem("expert-0", "/m: no such directory")
    assert board.number == before, "nothing new"
    assert board.current(0.0).problem == "/m: no such directory"
    for actor in ACTORS:
        standing.actor_up(address(actor, "b"), standing.assigned(actor))
    assert board.current(0.0).problem == ""
