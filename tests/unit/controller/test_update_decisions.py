"""An update's decisions from the cluster state: when a version is published, and which update it belongs to."""

import pytest

from moecluster.controller.context import new_context
from moecluster.controller.operations.weight_rollout import UpdateSettings, WeightUpdates
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.errors import CheckpointError, Unavailable
from moecluster.metrics import Metrics
from moecluster.placement.initial import contiguous_placement
from moecluster.rpc.controller.latest_placement import PlacementBoard
from moecluster.types import ActorAddress, Operation, OperationKind, OperationPhase, WeightVersion

LAYER_EXPERTS = {0: 4}
LEASE_S = 1.0
GRACE_S = 5.0
ACTORS = ("expert-0", "expert-1")


class Updated:
    """A cluster as the controller sees it: two running actors with two experts each."""

    def __init__(self, *, term: int = 1, start_s: float = 0.0) -> None:
        """start_s: how long the controller takes to start, before routers can find it."""
        self.now_s = 0.0
        self.context = new_context(
            LAYER_EXPERTS,
            lease_s=LEASE_S,
            board=PlacementBoard(),
            metrics=Metrics(model="tiny"),
            clock=lambda: self.now_s,
        )
        self.cluster_state, self.log = self.context.state, self.context.operations
        self.cluster_state.begin(
            term=term,
            generation=0,
            versions=WeightVersions.only(WeightVersion(version=1, checkpoint="/old")),
            actors=ACTORS,
            replicas=contiguous_placement(LAYER_EXPERTS, ACTORS),
        )
        self.updates = WeightUpdates(self.context, UpdateSettings(prepare_timeout_s=10.0, router_grace_s=GRACE_S))
        for actor in ACTORS:
            self.bring_up(actor)
        self.now_s += start_s
        self.cluster_state.open()
        self.context.leases.opened()
        self.now_s += LEASE_S  # routers had time to report

    def bring_up(self, actor: str) -> None:
        self.cluster_state.actor_up(_address(actor), self.cluster_state.assigned(actor))

    def prepare(self, actor: str, version: int) -> None:
        self.cluster_state.actor_prepared(_address(actor), version, self.cluster_state.assigned(actor))

    def request_update(self, directory: str) -> Operation:
        return self.log.enqueue(OperationKind.UPDATE, reason="requested", arguments=(directory,))

    def check(self, times: int = 4) -> None:
        for _ in range(times):
            self.updates.check()


def _address(actor: str) -> ActorAddress:
    return ActorAddress(actor=actor, address="127.0.0.1:1", incarnation="a")


@pytest.fixture
def cluster() -> Updated:
    return Updated()


def test_a_version_that_nobody_can_serve_whole_is_not_published(cluster: Updated) -> None:
    operation = cluster.request_update("/new")
    cluster.check()
    cluster.prepare("expert-0", 2)
    cluster.cluster_state.actor_down("expert-1")
    cluster.check()
    assert cluster.cluster_state.versions.weight_version == 1, "its experts may be too much for expert-1"
    assert "loaded by all but expert-1" in cluster.log.get(operation.id).detail
    cluster.bring_up("expert-1")
    cluster.check()
    assert cluster.cluster_state.versions.weight_version == 1
    cluster.prepare("expert-1", 2)
    cluster.check()
    assert cluster.log.get(operation.id).phase is OperationPhase.DONE
    assert cluster.cluster_state.versions.checkpoint == "/new"


def test_an_update_that_kills_an_actor_again_and_again_fails_in_time(cluster: Updated) -> None:
    operation = cluster.request_update("/new")
    cluster.check()
    cluster.prepare("expert-0", 2)
    cluster.cluster_state.actor_down("expert-1")
    cluster.now_s += 10.0
    cluster.check()
    failed = cluster.log.get(operation.id)
    assert failed.phase is OperationPhase.FAILED and "expert-1 did not load the new version" in failed.detail
    assert [v.checkpoint for v in cluster.cluster_state.versions.all] == ["/old"]


def test_an_actor_that_refuses_the_new_version_ends_the_update_and_one_that_fails_for_now_does_not(
    cluster: Updated,
) -> None:
    operation = cluster.request_update("/new")
    cluster.check()
    cluster.context.reports.preparing_failed("expert-0", 2, Unavailable("the disk is away"))
    cluster.check()
    assert cluster.log.get(operation.id).phase is OperationPhase.PREPARING
    cluster.context.reports.preparing_failed("expert-0", 1, CheckpointError("/old is torn"))
    cluster.check()
    assert cluster.log.get(operation.id).phase is OperationPhase.PREPARING, "of another version"
    cluster.context.reports.preparing_failed("expert-0", 2, CheckpointError("/new is torn"))
    cluster.context.reports.prepared("expert-0")
    cluster.check()
    assert cluster.log.get(operation.id).phase is OperationPhase.PREPARING, "it was loaded after all"
    cluster.context.reports.preparing_failed("expert-0", 2, CheckpointError("/new is torn"))
    cluster.check()
    failed = cluster.log.get(operation.id)
    assert failed.phase is OperationPhase.FAILED
    assert failed.detail == "expert-0 cannot load the new version: /new is torn"


def test_a_lost_actor_whose_experts_others_serve_does_not_delay_an_update(cluster: Updated) -> None:
    layer = {0: tuple(r for a in ACTORS for r in contiguous_placement(LAYER_EXPERTS, (a,)))}
    every_expert = frozenset(r.expert for r in layer[0])
    cluster.cluster_state.commit(layer, dict.fromkeys(ACTORS, every_expert))
    operation = cluster.request_update("/new")
    cluster.check()
    cluster.prepare("expert-0", 2)
    cluster.cluster_state.actor_down("expert-1")
    cluster.check()
    assert cluster.log.get(operation.id).phase is OperationPhase.DONE


def test_an_update_does_not_publish_what_another_one_left(cluster: Updated) -> None:
    cluster.cluster_state.begin_version("/abandoned")
    for actor in ACTORS:
        cluster.prepare(actor, 2)
    operation = cluster.request_update("/new")
    cluster.check()
    for actor in ACTORS:
        cluster.prepare(actor, 3)
    cluster.check()
    assert cluster.log.get(operation.id).detail == "version 3: /new"
    assert cluster.cluster_state.versions.checkpoint == "/new"


def test_an_update_begins_when_another_one_that_is_published_has_ended(cluster: Updated) -> None:
    cluster.cluster_state.begin_version("/abandoned")
    for actor in ACTORS:
        cluster.prepare(actor, 2)
    assert cluster.cluster_state.publish_version() is not None
    operation = cluster.request_update("/new")
    cluster.check()
    assert cluster.log.get(operation.id).phase is OperationPhase.PREPARING
    for actor in ACTORS:
        cluster.prepare(actor, 3)
    cluster.check()
    assert cluster.log.get(operation.id).detail == "version 3: /new"


def test_a_mistake_of_ours_ends_the_update_and_nothing_else(cluster: Updated, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = cluster.request_update("/new")
    cluster.check()

    def mistake(version: int) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cluster.context.reports, "not_prepared", mistake)
    for actor in ACTORS:
        cluster.prepare(actor, 2)
    with pytest.raises(RuntimeError):
        cluster.updates.check()
    assert cluster.log.get(operation.id).phase is OperationPhase.FAILED
    assert [v.checkpoint for v in cluster.cluster_state.versions.all] == ["/old"]


def test_a_successor_waits_for_routers_from_when_they_can_find_it() -> None:
    cluster = Updated(term=2, start_s=60.0)
    cluster.request_update("/new")
    cluster.check()
    for actor in ACTORS:
        cluster.prepare(actor, 2)
    cluster.check()
    assert cluster.cluster_state.versions.weight_version == 2
    cluster.now_s += GRACE_S - LEASE_S - 0.1
    cluster.check()
    assert cluster.cluster_state.versions.old == 1, "a router with requests of version 1 may look for it still"
    cluster.now_s += 0.2
    cluster.check()
    assert cluster.cluster_state.versions.old == 0
