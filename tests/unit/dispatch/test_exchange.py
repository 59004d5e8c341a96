"""Failures of calls to remote experts, and their handling: retries, newer placements, aborted attempts."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from moecluster.dispatch import connection_pool
from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import AttemptAborted, DeadlineExceeded, ExpertsLost, StaleRequest, UserError
from moecluster.metrics import Metrics
from moecluster.rpc.controller.in_process import FixedPlacement
from moecluster.rpc.expert.in_process import InProcessTransport
from moecluster.rpc.expert.interface import ExpertTransport
from moecluster.rpc.expert.requests import LoadRequest, PlacementNotice
from moecluster.types import ActorAddress, ExpertId, Placement, PlacementNumber, Replica
from tests.support.clusters.expert_cluster import ExpertCluster, control_of
from tests.support.expert.small_actor import (
    EXPERTS,
    LAYER,
    SGD,
    TAG,
    TIMEOUT_S,
    WIDTH,
    Occupied,
    batch_of,
    queued_rows,
    submit,
    wait_for_rows,
)
from tests.support.expert.small_actor import serving as served_actor
from tests.support.expert.small_layer import HALVES, TOKENS, TWICE, check_served, dense, tokens


class Moving:
    """A PlacementSource that publishes a newer placement on request."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.changed = threading.Condition()
        self.reports: list[tuple[str, str]] = []
        self.nonfinite: list[tuple[str, ExpertId]] = []
        self.wanted: list[tuple[int, tuple[int, ...]]] = []

    def publish(self, **changes: object) -> None:
        with self.changed:
            self.placement = replace(self.placement, generation=self.placement.generation + 1, **changes)  # type: ignore[arg-type]
            self.changed.notify_all()

    def current(self, timeout_s: float) -> Placement:
        return self.placement

    def newer_than(self, number: PlacementNumber, timeout_s: float) -> Placement | None:
        with self.changed:
            self.changed.wait_for(lambda: self.placement.number > number, timeout_s)
            return self.placement if self.placement.number > number else None

    def report_failure(self, actor: str, incarnation: str, reason: str) -> None:
        self.reports.append((actor, reason))

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        self.nonfinite.append((actor, expert))

    def want_experts(self, layer: int, experts: Sequence[int]) -> None:
        self.wanted.append((layer, tuple(experts)))


def remote_over(
    cluster: ExpertCluster,
    source: FixedPlacement | Moving,
    timeout_s: float = TIMEOUT_S,
    *,
    connect: Callable[[ActorAddress], ExpertTransport] | None = None,
) -> RemoteExperts:
    """connect: None: to the cluster's services."""
    pool = ExpertPool(
        source,
        connect=connect or cluster.connect,
        control=lambda address: control_of(cluster.services[address.actor]),
    )
    return RemoteExperts(pool, timeout_s=timeout_s)


def test_a_lost_replica_s_tokens_go_to_the_other(checkpoint: Path, modules: dict[int, nn.Module]) -> None:
    with ExpertCluster(checkpoint, replicas=TWICE) as cluster:
        source = Moving(cluster.placement)
        remote = remote_over(cluster, source)
        check_served(remote, modules)
        cluster.services["expert-0"].close()
        check_served(remote, modules)
        assert {actor for actor, _ in source.reports} == {"expert-0"}


def test_where_another_incarnation_of_an_actor_listens_the_other_replica_is_asked(
    checkpoint: Path, modules: dict[int, nn.Module]
) -> None:
    with ExpertCluster(checkpoint, replicas=TWICE) as cluster:

        def connect_to_another(address: ActorAddress) -> ExpertTransport:
            if address.actor == "expert-0":
                raise StaleRequest("expert-0 is incarnation b, not a")
            return cluster.connect(address)

        check_served(remote_over(cluster, Moving(cluster.placement), connect=connect_to_another), modules)


def test_an_actor_that_did_not_answer_is_left_alone_for_a_while(
    checkpoint: Path, modules: dict[int, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one request hits a dead actor; the others go elsewhere at once, for a limited time."""
    with ExpertCluster(checkpoint, replicas=TWICE) as cluster:
        source = Moving(cluster.placement)
        remote = remote_over(cluster, source)
        cluster.services["expert-0"].close()
        for _ in range(5):
            check_served(remote, modules)
        assert len(source.reports) == 1
        monkeypatch.setattr(connection_pool, "SUSPECT_S", 0.0)
        time.sleep(1.1)
        for _ in range(2):
            check_served(remote, modules)
        assert len(source.reports) == 3
        again = ActorAddress(actor="expert-0", address="", incarnation="another")
        source.publish(actors={**cluster.placement.actors, "expert-0": again})
        assert remote.pool.suspects(source.placement) == {}, "another incarnation of it is asked at once"


def test_an_expert_that_an_actor_has_lost_is_asked_for_elsewhere_and_reported(
    checkpoint: Path, modules: dict[int, nn.Module]
) -> None:
    """The actor answers, but was restarted without its experts: its placement is no newer than the router's."""
    with ExpertCluster(checkpoint, replicas=TWICE) as cluster:
        source = Moving(cluster.placement)
        cluster.services["expert-1"].unload(term=1, experts=EXPERTS[1:3])
        check_served(remote_over(cluster, source), modules)
        assert source.reports[0][0] == "expert-1" and "are not here" in source.reports[0][1]


def call_in_thread(remote: RemoteExperts, caller: ThreadPoolExecutor) -> Callable[[], torch.Tensor]:
    @torch.no_grad()
    def call() -> torch.Tensor:
        return remote(LAYER, *tokens())

    future = caller.submit(call)
    return lambda: future.result(TIMEOUT_S)


def test_a_retry_changes_no_bit_of_a_sum_over_three_actors(checkpoint: Path) -> None:
    """Partial sums are added in the order of the actors, not of their replies."""
    names = [f"expert-{i}" for i in range(3)]
    with ExitStack() as running, ThreadPoolExecutor(1) as caller:
        services = {
            name: running.enter_context(served_actor(checkpoint, name, max_queue_bytes=TOKENS * WIDTH * 4))
            for name in names
        }
        placement = Placement(
            term=1,
            generation=1,
            layer_experts={LAYER: len(EXPERTS)},
            actors={n: ActorAddress(actor=n, address="", incarnation=s.incarnation) for n, s in services.items()},
            replicas=tuple(Replica(expert=expert, actor=names[expert.index % 3]) for expert in EXPERTS),
        )
        metrics = Metrics(model="m")
        pool = ExpertPool(
            FixedPlacement(placement),
            connect=lambda address: InProcessTransport(services[address.actor]),
            control=lambda address: control_of(services[address.actor]),
        )
        remote = RemoteExperts(pool, metrics=metrics)
        x_TD, _, _ = tokens()
        routing = torch.tensor([[0, 1, 2]]).expand(TOKENS, 3).contiguous(), torch.rand(TOKENS, 3)

        @torch.no_grad()
        def call() -> torch.Tensor:
            return remote(LAYER, x_TD, *routing)

        undisturbed = call()
        first = services["expert-0"]
        with Occupied(first):
            submit(first, batch_of(TOKENS))  # fills the queue
            result = caller.submit(call)
            while 'reason="exhausted"' not in metrics.render():
                time.sleep(0.002)
        assert torch.equal(result.result(TIMEOUT_S), undisturbed)


def test_only_the_pairs_that_moved_are_sent_again_by_the_newer_placement(
    checkpoint: Path, modules: dict[int, nn.Module]
) -> None:
    """If an actor knows a newer placement, the router waits for that placement and reports no failure."""
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster, ThreadPoolExecutor(1) as caller:
        source = Moving(cluster.placement)
        cluster.services["expert-0"].load(LoadRequest(term=1, experts=EXPERTS, checkpoint=str(checkpoint)))
        cluster.services["expert-1"].unload(term=1, experts=EXPERTS)
        for service in cluster.services.values():
            service.set_placement(PlacementNotice(term=1, generation=2))
        result = call_in_thread(remote_over(cluster, source), caller)
        time.sleep(0.1)
        source.publish(replicas=tuple(Replica(expert=expert, actor="expert-0") for expert in EXPERTS))
        batch = tokens()
        torch.testing.assert_close(result(), dense(modules, *batch).detach(), atol=5e-6, rtol=0)
        assert source.reports == []


def test_an_expert_without_any_replica_is_asked_for_and_waited_for(
    checkpoint: Path, modules: dict[int, nn.Module]
) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster, ThreadPoolExecutor(1) as caller:
        source = Moving(replace(cluster.placement, replicas=HALVES[:2]))
        result = call_in_thread(remote_over(cluster, source), caller)
        time.sleep(0.1)
        assert source.wanted == [(LAYER, (2, 3))]
        source.publish(replicas=HALVES)
        torch.testing.assert_close(result(), dense(modules, *tokens()).detach(), atol=5e-6, rtol=0)
        assert source.wanted == [(LAYER, (2, 3))] and source.reports == []


def test_an_expert_that_cannot_be_loaded_is_not_waited_for(checkpoint: Path) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster, ThreadPoolExecutor(1) as caller:
        source = Moving(replace(cluster.placement, replicas=HALVES[:2], problem="/m: no such directory"))
        with pytest.raises(ExpertsLost, match="/m: no such directory"):
            call_in_thread(remote_over(cluster, source, timeout_s=1000.0), caller)()
        assert source.wanted == []


@torch.no_grad()
def test_an_expert_whose_only_actor_does_not_answer_is_not_asked_for(checkpoint: Path) -> None:
    """The placement has a replica of it, so the router reports the failure and the controller handles the actor."""
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster:
        source = Moving(cluster.placement)
        cluster.services["expert-1"].close()
        with pytest.raises(DeadlineExceeded):
            remote_over(cluster, source, timeout_s=0.3)(LAYER, *tokens())
        assert source.wanted == [] and {actor for actor, _ in source.reports} == {"expert-1"}


def test_controls_are_kept_until_their_actor_changes(checkpoint: Path) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster:
        source = Moving(cluster.placement)
        pool = remote_over(cluster, source).pool
        first = pool.controls()
        assert pool.controls() == first
        address = cluster.placement.actors["expert-1"]
        source.publish(actors={"expert-1": replace(address, incarnation="another")}, replicas=HALVES[2:])
        second: dict[str, Any] = dict(pool.controls())
        assert set(second) == {"expert-1"} and second["expert-1"] is not first["expert-1"]
        assert [cast(Any, control).closed for control in first.values()] == [True, True]
        pool.close()
        assert second["expert-1"].closed


@torch.no_grad()
def test_what_does_not_come_within_the_timeout_is_an_error_that_says_why(checkpoint: Path) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster:
        remote = remote_over(cluster, Moving(replace(cluster.placement, replicas=HALVES[:2])), timeout_s=0.2)
        with pytest.raises(DeadlineExceeded, match=r"did not answer in time: layer 1: no replica of experts \[2, 3\]"):
            remote(LAYER, *tokens())
        hanging = remote_over(cluster, FixedPlacement(cluster.placement), timeout_s=0.2)
        with Occupied(cluster.services["expert-1"]), pytest.raises(DeadlineExceeded):
            hanging(LAYER, *tokens())


@torch.no_grad()
def test_a_layer_without_experts_is_an_error(checkpoint: Path) -> None:
    complaint = r"no experts of layer 7, only of \[1\]: the trunk is of another model"
    with ExpertCluster(checkpoint, replicas=HALVES) as cluster, pytest.raises(UserError, match=complaint):
        cluster.remote(7, *tokens())


def test_an_attempt_ends_when_an_actor_is_gone(checkpoint: Path) -> None:
    """In training, no other replica can replace the actor: it lacks the gradients accumulated so far."""
    with ExpertCluster(checkpoint, replicas=TWICE, optimizer=SGD) as cluster:
        remote = remote_over(cluster, FixedPlacement(cluster.placement))
        with remote.training(TAG):
            y_TD = remote(LAYER, *tokens())
            cluster.services["expert-1"].close()
            with pytest.raises(AttemptAborted, match="expert-1 is gone"):
                y_TD.sum().backward()
            with pytest.raises(AttemptAborted, match="expert-1 is gone"):
                remote(LAYER, *tokens())


def test_an_attempt_ends_when_another_incarnation_of_the_actor_answers(checkpoint: Path) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES, optimizer=SGD) as cluster:
        address = cluster.placement.actors["expert-1"]
        actors = {**cluster.placement.actors, "expert-1": replace(address, incarnation="before")}
        remote = remote_over(cluster, FixedPlacement(replace(cluster.placement, actors=actors)))
        with remote.training(TAG), pytest.raises(AttemptAborted, match="expert-1: this is incarnation"):
            remote(LAYER, *tokens())


def test_an_attempt_without_a_replica_for_an_expert_ends_at_once(checkpoint: Path) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES, optimizer=SGD) as cluster:
        remote = remote_over(cluster, FixedPlacement(replace(cluster.placement, replicas=HALVES[:3])))
        with remote.training(TAG), pytest.raises(AttemptAborted, match=r"no replica of experts \[3\]"):
            remote(LAYER, *tokens())


def test_a_hanging_actor_ends_the_attempt_at_the_deadline(checkpoint: Path) -> None:
    with ExpertCluster(checkpoint, replicas=HALVES, optimizer=SGD) as cluster:
        remote = remote_over(cluster, FixedPlacement(cluster.placement), timeout_s=0.2)
        service = cluster.services["expert-0"]
        with Occupied(service), remote.training(TAG):
            with pytest.raises(AttemptAborted, match=r"expert-0: expert-0 did not answer in 0\.2 s"):
                remote(LAYER, *tokens())
            assert queued_rows(service) > 0
        wait_for_rows(service, 0)
