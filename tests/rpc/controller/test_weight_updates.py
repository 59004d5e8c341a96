"""Weight updates while serving, over real gRPC: running requests must not notice."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moecluster.controller.operations.weight_rollout import UpdateSettings
from moecluster.controller.rebalance.apply import ApplierSettings
from moecluster.controller.rebalance.observe import ObserverSettings
from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.errors import CheckpointError, ResourceError, StaleRequest
from moecluster.expert.loader import ExpertLoader
from moecluster.models.checkpoint.reader import Checkpoint
from moecluster.models.trunk import load_trunk
from moecluster.models.update.compose import compose
from moecluster.rpc.checkpoint.client import RemoteFiles, SourceAddress
from moecluster.rpc.checkpoint.server import Announcements, serve_checkpoints
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.types import NO_PLACEMENT, ExpertId, OperationPhase, PlacementNumber, RouterState
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.models.weight_versions import PROMPTS, Clients, done, ended, requests_alone, save_version, write
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(180)
SILENT_S = 6.0  # how long a silent router is waited for; the new version loads within it


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Checkpoint directories of the weight versions 1, 2 and 3."""
    root = tmp_path_factory.mktemp("models")
    return [save_version(root / name, seed) for seed, name in enumerate(("first", "second", "third"))]


@pytest.fixture(scope="module")
def alone(versions: list[str]) -> list[dict[str, list[int]]]:
    return [requests_alone(directory) for directory in versions]


@pytest.fixture
def start(versions: list[str]) -> Iterator[Callable[..., LoopbackCluster]]:
    """Starts clusters that serve version 1, and ends them."""
    started: list[LoopbackCluster] = []

    def start_cluster(num_actors: int = 2, *, slots: int = 4, **settings: Any) -> LoopbackCluster:
        cluster = LoopbackCluster(
            versions[0],
            num_actors=num_actors,
            observer=ObserverSettings(window="sliding", window_s=2.0, slots_per_layer=slots),
            reconciler=ReconcilerSettings(policy="static", period_s=0.05, operation_timeout_s=10.0),
            applier=ApplierSettings(drain_timeout_s=2.0),
            **settings,
        )
        started.append(cluster)
        return cluster

    yield start_cluster
    for cluster in started:
        cluster.__exit__()


@pytest.fixture
def slow_loads(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Loads versions after the first slowly, one expert at a time; sets the event once a load has begun."""
    begun = threading.Event()
    load = ExpertLoader.load

    def slow_load(self: ExpertLoader, order: Any, settings: Any) -> int:
        if settings.weight_version > 1:
            begun.set()
            time.sleep(0.1)
        return load(self, order, settings)

    monkeypatch.setattr(ExpertLoader, "load", slow_load)
    monkeypatch.setattr("moecluster.controller.actors.session.MAX_PREPARED_AT_ONCE", 1)
    return begun


def published(cluster: LoopbackCluster) -> int:
    return cluster.controller.current(10.0).weight_version


def held_versions(cluster: LoopbackCluster) -> set[int]:
    """The versions held by all actors and the router."""
    statuses = [service.status() for service in cluster.services.values()]
    in_use = cluster.router.state()
    return {version for status in statuses for version in (status.weight_version, *status.other_versions)} | {
        in_use.weight_version,
        in_use.oldest_weight_version,
    }


def call_layer(cluster: LoopbackCluster, version: int) -> torch.Tensor:
    x_TD = torch.ones(4, 32)
    ids_TK = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    return cluster.remote(0, x_TD, ids_TK, torch.ones(4, 2), weight_version=version)


def test_requests_end_as_they_began_and_new_ones_take_the_new_weights(start, versions, alone) -> None:
    cluster = start()
    bytes_before = [service.status().hosted_bytes for service in cluster.services.values()]
    with Clients(cluster, alone) as clients:
        operation = cluster.controller.update(versions[1])
        wait_until(lambda: published(cluster) == 2, "version 2")
        published_s = time.monotonic()
        finished = done(cluster, operation)
        after = len(clients.texts)
        wait_until(lambda: len(clients.texts) > after + 3, "more texts")
        assert clients.versions() == {1, 2}
        assert any(t.weight_version == 1 and t.ended_s > published_s for t in clients.texts), "a text spans the change"
    assert finished.detail == f"version 2: {versions[1]}" and finished.moved_bytes == sum(bytes_before)
    status = cluster.controller.status()
    assert (status.weight_version, status.checkpoint) == (2, versions[1])
    assert held_versions(cluster) == {2}, "memory returns"
    assert [service.status().hosted_bytes for service in cluster.services.values()] == bytes_before
    assert cluster.router.status().weight_version == 2 and cluster.router.status().model == versions[1]
    assert [state.weight_version for state in status.router_states] == [2]
    with pytest.raises(StaleRequest, match="weight version 1 is not served any more: 2 is"):
        call_layer(cluster, 1)


def test_the_old_version_stays_until_its_last_request_has_ended(start, versions, alone) -> None:
    cluster = start(3, slots=4)
    with cluster.router.models.use() as old:  # a long request
        first = call_layer(cluster, 1)
        operation = cluster.controller.update(versions[1])
        wait_until(lambda: "still run on router" in cluster.controller.operation(operation.id).detail)
        assert cluster.controller.operation(operation.id).phase is OperationPhase.COMMITTING
        wait_until(lambda: cluster.router.state().weight_version == 2)
        assert write(cluster, PROMPTS[0]).ids == alone[1][PROMPTS[0]]
        assert old.version == 1 and torch.equal(call_layer(cluster, 1), first)
        # Experts move meanwhile, in both versions, and a lost actor comes back with both.
        done(cluster, cluster.controller.place(ExpertId(layer=0, index=0), ["expert-2"]))
        cluster.kill("expert-1")
        assert torch.allclose(call_layer(cluster, 1), first, atol=1e-5)
        assert not torch.allclose(call_layer(cluster, 2), first, atol=1e-2)
        cluster.revive("expert-1")
        wait_until(lambda: "expert-1" in cluster.controller.current(0.0).actors)
        assert torch.allclose(call_layer(cluster, 1), first, atol=1e-5)
        assert held_versions(cluster) == {1, 2}
    done(cluster, operation)
    assert held_versions(cluster) == {2}


def test_no_request_is_waited_for_longer_than_the_longest_may_take(start, versions) -> None:
    cluster = start(update=UpdateSettings(old_requests_timeout_s=0.3, router_grace_s=0.0))
    with cluster.router.models.use():
        done(cluster, cluster.controller.update(versions[1]))
        with pytest.raises(StaleRequest):
            call_layer(cluster, 1)


def test_an_actor_that_is_killed_amid_an_update_comes_back_and_takes_part(start, versions, alone, slow_loads) -> None:
    cluster = start(3)
    with Clients(cluster, alone):
        operation = cluster.controller.update(versions[1])
        assert slow_loads.wait(10.0)
        cluster.kill("expert-1")
        time.sleep(0.2)
        cluster.revive("expert-1")
        done(cluster, operation)
        wait_until(lambda: set(cluster.controller.current(0.0).actors) == set(cluster.names))
    assert held_versions(cluster) == {2}


@pytest.mark.parametrize("when", ["loading", "ending texts"])
def test_a_successor_goes_on_with_an_update(start, versions, alone, slow_loads, when) -> None:
    cluster = start()
    with Clients(cluster, alone) as clients:
        with cluster.router.models.use():
            operation = cluster.controller.update(versions[1])
            assert slow_loads.wait(10.0)
            if when == "ending texts":
                wait_until(lambda: "still run on" in cluster.controller.operation(operation.id).detail)
            cluster.replace_controller()
            wait_until(lambda: published(cluster) == 2, "version 2")
            assert cluster.controller.status().term == 2
        done(cluster, operation)
        wait_until(lambda: 2 in clients.versions(), "texts of version 2")
    assert held_versions(cluster) == {2}


def test_updates_wait_for_each_other(start, versions, alone) -> None:
    cluster = start()
    with Clients(cluster, alone) as clients:
        first = cluster.controller.update(versions[1], operation_id="first")
        second = cluster.controller.update(versions[2], operation_id="second")
        assert cluster.controller.update(versions[2], operation_id="second").id == second.id
        done(cluster, first)
        done(cluster, second)
        wait_until(lambda: 3 in clients.versions(), "texts of version 3")
    assert held_versions(cluster) == {3}
    done(cluster, cluster.controller.update(versions[0]))
    assert (published(cluster), write(cluster, PROMPTS[0]).ids) == (4, alone[0][PROMPTS[0]])


def test_what_an_actor_cannot_load_leaves_the_old_version(start, versions, alone, monkeypatch) -> None:
    load = ExpertLoader.load

    def torn_load(self: ExpertLoader, order: Any, settings: Any) -> int:
        if settings.weight_version == 2 and self._actor == "expert-1":
            raise CheckpointError("model.safetensors is torn: it ends early; copy it again")
        return load(self, order, settings)

    monkeypatch.setattr(ExpertLoader, "load", torn_load)
    cluster = start()
    with Clients(cluster, alone) as clients:
        failed = ended(cluster, cluster.controller.update(versions[1]))
        assert failed.phase is OperationPhase.FAILED
        assert failed.detail == (
            "expert-1 cannot load the new version: model.safetensors is torn: it ends early; copy it again"
        )
        wait_until(lambda: held_versions(cluster) == {1})
        done(cluster, cluster.controller.update(versions[2]))
    assert clients.versions() <= {1, 3} and published(cluster) == 3, "no number is given twice"


def test_a_trunk_that_cannot_be_loaded_leaves_the_old_version(start, versions, alone, monkeypatch) -> None:
    cluster = start()

    def torn_trunk(checkpoint: Checkpoint, *args: Any) -> Any:
        if str(checkpoint.path) == versions[1]:
            raise CheckpointError(f"{checkpoint.path} has no model.norm.weight")
        return load_trunk(checkpoint, *args)

    monkeypatch.setattr("moecluster.router.router.load_trunk", torn_trunk)
    with Clients(cluster, alone):
        failed = ended(cluster, cluster.controller.update(versions[1]))
        assert failed.phase is OperationPhase.FAILED
        assert failed.detail == (
            f"router cannot load the trunk of the new version: {versions[1]} has no model.norm.weight"
        )
        assert published(cluster) == 1
        done(cluster, cluster.controller.update(versions[2]))
    assert held_versions(cluster) == {3}


def test_whoever_does_not_load_in_time_is_named(start, versions, alone, monkeypatch) -> None:
    cluster = start(update=UpdateSettings(prepare_timeout_s=0.5))
    monkeypatch.setattr("moecluster.router.router.load_tokenizer", lambda path: time.sleep(2.0))
    failed = ended(cluster, cluster.controller.update(versions[1]))
    assert failed.detail == "router did not load the new version within 0.5 s"
    assert write(cluster, PROMPTS[0]).ids == alone[0][PROMPTS[0]]


def test_wrong_directories_are_refused_by_name(start, versions, tmp_path) -> None:
    cluster = start()
    wide = save_version(tmp_path / "wide", 1, expert_inner_size=48)
    more = save_version(tmp_path / "more", 1, num_experts=8)
    torn = Path(shutil.copytree(versions[1], tmp_path / "torn"))
    file = torn / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with ControllerCalls(cluster.controller_server.address) as calls:
        for directory, complaint in (
            (str(tmp_path / "none"), f"no model directory at {tmp_path / 'none'}"),
            (str(torn), "model.safetensors is torn"),
            (more, rf"{more} is of another model than .*: its experts .* are 0: 8, 1: 8, not 0: 4, 1: 4"),
            (wide, rf"{wide} is of another model than .*: the experts of layer 0 have shapes"),
            (versions[0], f"update: {versions[0]} is weight version 1 already"),
        ):
            with pytest.raises(ValueError, match=complaint) as refused:
                calls.update(directory)
            assert "\n" not in str(refused.value)
    assert cluster.controller.operations(0) == ()


def test_what_only_another_host_sees_is_read_from_there(start, versions, alone, tmp_path) -> None:
    composed, announcements = tmp_path / "composed", Announcements()
    taken = [ExpertId(layer=layer, index=index) for layer in (0, 1) for index in range(4)]
    compose(versions[0], versions[1], composed, experts=taken, keep_trunk=True)
    for name, directory in (("/far/second", versions[1]), ("/far/composed", composed)):
        announcements.add(name, directory)
    server = serve_checkpoints(announcements, credentials=None)

    def open_elsewhere(name: str) -> Checkpoint:
        announced = announcements.named(name)
        if announced is None:
            raise CheckpointError(f"{name}: no node has announced it")
        source = SourceAddress(address=server.address, id=announced.id)
        return Checkpoint.of(RemoteFiles(name, lambda: source))

    cluster = start(open_elsewhere=open_elsewhere)
    with pytest.raises(CheckpointError, match="/far/third: no node has announced it"):
        cluster.controller.update("/far/third")
    done(cluster, cluster.controller.update("/far/second"))
    assert write(cluster, PROMPTS[0]).ids == alone[1][PROMPTS[0]]
    done(cluster, cluster.controller.update("/far/composed"))
    assert write(cluster, PROMPTS[0]).ids == requests_alone(str(composed))[PROMPTS[0]] != alone[1][PROMPTS[0]]
    assert cluster.controller.status().checkpoint == "/far/composed" and held_versions(cluster) == {3}
    server.stop(0.0)


def test_training_and_updates_exclude_each_other(start, versions, slow_loads) -> None:
    cluster = start(lease_s=5.0, update=UpdateSettings(router_grace_s=60.0))  # generous, for a busy machine
    operation = cluster.controller.update(versions[1])
    assert slow_loads.wait(60.0)
    cluster.controller.renew_lease("trainer", NO_PLACEMENT, hold=True)
    assert "a training run started" in ended(cluster, operation).detail
    wait_until(lambda: cluster.controller.current(0.0).held)
    placement = cluster.controller.current(0.0)
    assert (placement.weight_version, placement.next_weight_version, placement.old_weight_version) == (1, 0, 0)
    with pytest.raises(ResourceError, match="update: a training run holds the placement"):
        cluster.controller.update(versions[1])
    cluster.controller.set_checkpoint(versions[2])  # as training does after a checkpoint
    assert (cluster.controller.status().weight_version, cluster.controller.status().checkpoint) == (1, versions[2])
    cluster.controller.renew_lease("trainer", NO_PLACEMENT, hold=False)
    wait_until(lambda: not cluster.controller.current(0.0).held)
    with cluster.router.models.use():
        operation = cluster.controller.update(versions[1])
        wait_until(lambda: published(cluster) > 1)
        for _ in range(5):
            cluster.controller.renew_lease("trainer", NO_PLACEMENT, hold=True)
            time.sleep(0.1)
        assert not cluster.controller.current(0.0).held, "texts of two versions are written"
    done(cluster, operation)

    def held() -> bool:
        cluster.controller.renew_lease("trainer", NO_PLACEMENT, hold=True)
        return bool(cluster.controller.current(0.0).held)

    wait_until(held)


def test_an_expert_that_moves_while_its_new_version_is_loaded_ends_nothing(start, versions, alone, monkeypatch) -> None:
    load = ExpertLoader.load
    expert, begun = ExpertId(layer=0, index=0), threading.Event()

    def load_until_unloaded(self: ExpertLoader, order: Any, settings: Any) -> int:
        if settings.weight_version == 2 and self._actor == "expert-0" and expert in settings.experts:
            begun.set()
            wait_until(lambda: order.dropped, "the unload")
        return load(self, order, settings)

    monkeypatch.setattr(ExpertLoader, "load", load_until_unloaded)
    cluster = start()
    with Clients(cluster, alone):
        operation = cluster.controller.update(versions[1])
        assert begun.wait(10.0)
        done(cluster, cluster.controller.place(expert, ["expert-1"]))
        done(cluster, operation)
    assert held_versions(cluster) == {2}


def test_a_router_that_is_not_heard_is_waited_for_beyond_its_lease(start, versions) -> None:
    cluster = start(update=UpdateSettings(router_grace_s=SILENT_S))
    silent = RouterState(router="silent", weight_version=1, oldest_weight_version=1, ready_weight_version=2)
    cluster.controller.renew_lease("silent", PlacementNumber(1, 1000), state=silent)
    begun_s = time.monotonic()
    operation = cluster.controller.update(versions[1])
    wait_until(lambda: "run on silent" in cluster.controller.operation(operation.id).detail)
    wait_until(lambda: "silent" not in cluster.controller.leases())
    assert not cluster.controller.operation(operation.id).phase.ended
    done(cluster, operation)
    assert time.monotonic() - begun_s > SILENT_S
