import dataclasses

import pytest

from moecluster.controller.state.cluster_state import ClusterState
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.metrics import Metrics
from moecluster.placement.initial import contiguous_placement
from moecluster.placement.names import with_whole_shares
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import ActorAddress, ExpertId, Replica, WeightVersion

LAYER_EXPERTS = {0: 2, 3: 2}
ACTORS = ("expert-0", "expert-1")


def expert(layer: int, index: int) -> ExpertId:
    return ExpertId(layer=layer, index=index)


def address(actor: str, incarnation: str = "a") -> ActorAddress:
    return ActorAddress(actor=actor, address="127.0.0.1:1", incarnation=incarnation)


@pytest.fixture
def board() -> PlacementBoard:
    return PlacementBoard()


@pytest.fixture
def cluster_state(board: PlacementBoard) -> ClusterState:
    cluster_state = ClusterState(LAYER_EXPERTS, board=board, metrics=Metrics(model="tiny"))
    cluster_state.begin(
        term=7,
        generation=3,
        versions=WeightVersions.only(WeightVersion(version=1, checkpoint="/m")),
        actors=ACTORS,
        replicas=contiguous_placement(LAYER_EXPERTS, ACTORS),
    )
    return cluster_state


def bring_up(cluster_state: ClusterState) -> None:
    for actor in ACTORS:
        cluster_state.actor_up(address(actor), cluster_state.assigned(actor))
    cluster_state.open()


def test_nothing_is_seen_before_it_is_opened(cluster_state, board) -> None:
    cluster_state.actor_up(address("expert-0"), cluster_state.assigned("expert-0"))
    assert board.number == (0, 0)
    cluster_state.open()
    placement = board.current(0.0)
    assert placement.number == (7, 4)
    assert {r.actor for r in placement.replicas} == {"expert-0"}


def test_an_actor_serves_only_what_it_holds(cluster_state, board) -> None:
    bring_up(cluster_state)
    cluster_state.actor_down("expert-1")
    assert cluster_state.lost() == {expert(0, 1), expert(3, 1)}
    cluster_state.actor_up(address("expert-1", "b"), [expert(0, 1)])
    assert cluster_state.lost() == {expert(3, 1)}
    assert board.current(0.0).experts_on("expert-1") == (expert(0, 1),)


def test_a_committed_layer_stands_and_an_expert_without_a_replica_is_cold(cluster_state, board) -> None:
    bring_up(cluster_state)
    both = (
        Replica(expert=expert(3, 0), actor="expert-0", share=0.25),
        Replica(expert=expert(3, 0), actor="expert-1", share=0.75),
    )
    number = cluster_state.commit({3: both}, {"expert-1": frozenset([expert(3, 0)])})
    placement = board.current(0.0)
    assert placement.number == number
    assert tuple(r for r in placement.replicas if r.expert.layer == 3) == both
    assert cluster_state.cold == {expert(3, 1)} and cluster_state.lost() == frozenset()
    assert cluster_state.assigned("expert-1") == {expert(0, 1), expert(3, 0)}


def test_what_is_prepared_is_kept_though_it_does_not_stand(cluster_state) -> None:
    bring_up(cluster_state)
    cluster_state.prepare("expert-0", [expert(3, 1)])
    assert expert(3, 1) in cluster_state.kept("expert-0") and expert(3, 1) not in cluster_state.assigned("expert-0")
    cluster_state.prepared("expert-0", [expert(3, 1)])
    assert cluster_state.kept("expert-0") == cluster_state.assigned("expert-0")


def test_a_look_at_the_same_incarnation_forgets_nothing_that_it_was_given(cluster_state) -> None:
    bring_up(cluster_state)
    moved = dataclasses.replace(cluster_state.replicas_of(3)[1], actor="expert-0")
    cluster_state.commit({3: (cluster_state.replicas_of(3)[0], moved)}, {"expert-0": frozenset([expert(3, 1)])})
    cluster_state.actor_up(address("expert-0"), [expert(0, 0), expert(3, 0)])
    assert expert(3, 1) in cluster_state.up()["expert-0"].held
    cluster_state.actor_up(address("expert-0", "another incarnation"), [expert(0, 0)])
    assert cluster_state.up()["expert-0"].held == {expert(0, 0)}


def test_a_removed_actor_leaves_nothing(cluster_state, board) -> None:
    bring_up(cluster_state)
    cluster_state.set_leaving(["expert-1"])
    cluster_state.remove_actor("expert-1")
    assert cluster_state.actors == ("expert-0",) and cluster_state.leaving == frozenset()
    assert set(board.current(0.0).actors) == {"expert-0"}
    cluster_state.actor_up(address("expert-1"), [expert(0, 1)])
    assert set(cluster_state.up()) == {"expert-0"}, "its monitor was slow to hear of it"
    assert cluster_state.lost() == {expert(0, 1), expert(3, 1)}, (
        "removed too early, its experts would be lost, not cold"
    )


def test_shares_are_made_whole() -> None:
    replicas = (
        Replica(expert=expert(0, 0), actor="expert-0", share=0.2),
        Replica(expert=expert(0, 0), actor="expert-1", share=0.2),
        Replica(expert=expert(0, 1), actor="expert-0", share=0.0),
        Replica(expert=expert(0, 1), actor="expert-1", share=0.0),
    )
    assert [r.share for r in with_whole_shares(replicas)] == [0.5, 0.5, 0.5, 0.5]


def prepare_all(cluster_state: ClusterState, version: int) -> None:
    for actor in ACTORS:
        cluster_state.actor_prepared(address(actor), version, cluster_state.assigned(actor))


def test_a_version_is_published_once_every_actor_that_is_up_holds_it(cluster_state, board) -> None:
    bring_up(cluster_state)
    assert (board.current(0.0).weight_version, board.current(0.0).checkpoint) == (1, "/m")
    version = cluster_state.begin_version("/n")
    placement = board.current(0.0)
    assert (placement.weight_version, placement.next_weight_version, placement.next_checkpoint) == (1, 2, "/n")
    assert placement.old_weight_version == 0
    assert (
        cluster_state.versions.written_with == cluster_state.versions.all[:1] and cluster_state.versions.next == version
    )
    cluster_state.actor_prepared(address("expert-0"), 2, cluster_state.assigned("expert-0"))
    assert cluster_state.publish_version() is None and cluster_state.unprepared() == ["expert-1"]
    cluster_state.actor_prepared(address("expert-1", "another incarnation"), 2, cluster_state.assigned("expert-1"))
    assert cluster_state.unprepared() == ["expert-1"]
    cluster_state.actor_down("expert-1")
    assert cluster_state.publish_version() == cluster_state.number, "a lost one comes back with both"
    placement = board.current(0.0)
    assert (placement.weight_version, placement.checkpoint, placement.next_weight_version) == (2, "/n", 0)
    assert placement.old_weight_version == 1
    assert [v.version for v in cluster_state.versions.written_with] == [1, 2]
    cluster_state.drop_other_versions()
    assert [v.version for v in cluster_state.versions.all] == [2]


def test_an_actor_that_was_told_of_the_old_version_only_serves_nothing(cluster_state) -> None:
    bring_up(cluster_state)
    old = cluster_state.versions.all
    cluster_state.actor_down("expert-1")
    cluster_state.begin_version("/n")
    cluster_state.actor_prepared(address("expert-0"), 2, cluster_state.assigned("expert-0"))
    assert cluster_state.publish_version() is not None
    cluster_state.actor_up(address("expert-1"), cluster_state.assigned("expert-1"), versions=old)
    assert cluster_state.up()["expert-1"].held == frozenset()
    cluster_state.actor_up(address("expert-1"), cluster_state.assigned("expert-1"), versions=cluster_state.versions.all)
    assert cluster_state.lost() == frozenset()


def test_experts_that_move_are_prepared_where_they_stand_now(cluster_state) -> None:
    bring_up(cluster_state)
    cluster_state.begin_version("/n")
    prepare_all(cluster_state, 2)
    assert cluster_state.unprepared() == []
    moved = dataclasses.replace(cluster_state.replicas_of(3)[1], actor="expert-0")
    cluster_state.commit({3: (cluster_state.replicas_of(3)[0], moved)}, {"expert-0": frozenset([expert(3, 1)])})
    assert cluster_state.unprepared() == ["expert-0"]
    prepare_all(cluster_state, 2)
    assert cluster_state.unprepared() == []


def test_a_version_that_was_given_up_leaves_its_number_unused(cluster_state, board) -> None:
    bring_up(cluster_state)
    cluster_state.begin_version("/torn")
    cluster_state.drop_other_versions()
    assert board.current(0.0).next_weight_version == 0 and cluster_state.versions.last_version == 2
    assert cluster_state.begin_version("/n").version == 3
    cluster_state.set_checkpoint("/trained")
    assert [v.checkpoint for v in cluster_state.versions.all] == ["/trained", "/n"]


def test_a_placement_says_why_lost_experts_cannot_be_loaded_if_none_of_them_can(cluster_state, board) -> None:
    bring_up(cluster_state)
    cluster_state.actor_down("expert-0")
    cluster_state.actor_down("expert-1")
    cluster_state.set_problem("expert-1", "/m: no such directory")
    assert board.current(0.0).problem == "", "expert-0 may come back at any moment"
    cluster_state.set_problem("expert-0", "/m: no such directory")
    before = board.number
    cluster_state.set_problem("expert-0", "/m: no such directory")
    assert board.number == before, "nothing new"
    assert board.current(0.0).problem == "/m: no such directory"
    for actor in ACTORS:
        cluster_state.actor_up(address(actor, "b"), cluster_state.assigned(actor))
    assert board.current(0.0).problem == ""
