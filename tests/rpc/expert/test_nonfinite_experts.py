"""An expert that returns NaN or infinity in a whole cluster: requests stay correct or fail; updates refuse it."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecluster.client import Client
from moecluster.controller.rebalance.apply import ApplierSettings
from moecluster.controller.rebalance.observe import ObserverSettings
from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.errors import RequestFailed
from moecluster.models.experts.source import ExpertSource
from moecluster.placement.initial import all_experts
from moecluster.types import ExpertId, OperationKind, OperationPhase, Replica
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.models.weight_versions import PROMPTS, done, ended, requests_alone, save_version, write
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(180)

SICK = ExpertId(layer=1, index=2)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_version(tmp_path_factory.mktemp("models") / "sound", 0)


@pytest.fixture(scope="module")
def alone(sound: str) -> dict[str, list[int]]:
    return requests_alone(sound)


def poisoned(sound: str, directory: Path, part: str) -> str:
    """A copy of the checkpoint whose first tensor with this part in its name holds a NaN."""
    shutil.copytree(sound, directory)
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in sorted(tensors) if part in name)
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def start(directory: str, **settings: Any) -> LoopbackCluster:
    return LoopbackCluster(
        directory,
        observer=ObserverSettings(window="sliding", window_s=2.0, slots_per_layer=8),
        reconciler=ReconcilerSettings(policy="static", period_s=0.05, operation_timeout_s=10.0),
        applier=ApplierSettings(drain_timeout_s=2.0),
        **settings,
    )


def states(cluster: LoopbackCluster) -> list[tuple[str, ExpertId, str]]:
    return [(r.actor, r.expert, r.state) for r in cluster.controller.status().replicas_aside]


def test_texts_stay_right_beside_a_sick_replica_which_is_loaded_anew(sound, alone) -> None:
    layers = {layer.layer: layer.num_experts for layer in ExpertSource(sound).layers}
    twice = tuple(
        Replica(expert=expert, actor=f"expert-{i}", share=0.5) for expert in all_experts(layers) for i in range(2)
    )
    with start(sound, replicas=twice) as cluster:
        assert write(cluster, PROMPTS[0]).ids == alone[PROMPTS[0]]
        store = cluster.services["expert-0"].store
        module = ExpertSource(sound).load(SICK).requires_grad_(False)
        next(module.parameters()).view(-1)[0] = math.nan
        store.add(SICK, module, store.weight_version)
        for prompt in PROMPTS:
            assert write(cluster, prompt).ids == alone[prompt]
        wait_until(lambda: states(cluster) == [("expert-0", SICK, "reloaded")], "the replica is loaded anew")
        operation = next(o for o in cluster.controller.operations(0) if o.kind is OperationKind.RESTORE)
        wait_until(lambda: cluster.controller.operation(operation.id).phase is OperationPhase.DONE)
        assert operation.reason == f"expert {SICK} of expert-0 answers NaN or infinity"
        assert all(bool(torch.isfinite(p.to_dense()).all()) for p in store.get(SICK, 0).module.parameters())
        for prompt in PROMPTS:
            assert write(cluster, prompt).ids == alone[prompt]
        assert states(cluster) == [("expert-0", SICK, "reloaded")]
        assert f'expert="{SICK.index}",layer="{SICK.layer}"' in next(
            line
            for line in cluster.metrics.render().splitlines()
            if line.startswith("moecluster_nonfinite_replies_total{")
        )


def test_without_another_replica_the_request_fails_in_plain_words_and_nothing_is_loaded_for_ever(
    sound, tmp_path
) -> None:
    directory = poisoned(sound, tmp_path / "sick", "layers.1.mlp.experts")
    with start(directory) as cluster, Client(cluster.router_server.address) as client:

        def fails() -> None:
            with pytest.raises(RequestFailed, match=r"expert \d of layer 1 answered NaN or infinity"):
                client.generate(PROMPTS[0], max_new_tokens=60).text()

        fails()
        wait_until(lambda: {state for *_, state in states(cluster)} == {"reloaded"})
        number = cluster.controller.status().generation
        wait_until(lambda: cluster.router.status().placement.generation >= number)
        fails()
        wait_until(lambda: {state for *_, state in states(cluster)} == {"sick"})
        (replica,) = cluster.controller.status().replicas_aside
        assert replica.problem.endswith(f"even after a reload from {directory}")
        phases = [o.phase for o in cluster.controller.operations(0) if o.kind is OperationKind.RESTORE]
        assert phases == [OperationPhase.FAILED, OperationPhase.DONE]
        fails()
        assert len([o for o in cluster.controller.operations(0) if o.kind is OperationKind.RESTORE]) == 2
        with pytest.raises(RequestFailed, match="of layer 1 answered NaN or infinity"):
            client.moe(1, torch.randn(40, 32))


def test_an_update_to_weights_that_are_not_finite_is_refused(sound, alone, tmp_path) -> None:
    experts = poisoned(sound, tmp_path / "experts", "layers.1.mlp.experts")
    trunk = poisoned(sound, tmp_path / "trunk", "embed_tokens")
    with start(sound) as cluster:
        failed = ended(cluster, cluster.controller.update(experts))
        assert failed.phase is OperationPhase.FAILED
        assert f"weight version 2 ({experts}): expert " in failed.detail
        assert failed.detail.endswith("of layer 1 answers NaN or infinity")
        assert write(cluster, PROMPTS[0]).ids == alone[PROMPTS[0]]
        failed = ended(cluster, cluster.controller.update(trunk))
        assert failed.phase is OperationPhase.FAILED
        assert "embed_tokens.weight holds NaN or infinity" in failed.detail
        assert write(cluster, PROMPTS[1]).ids == alone[PROMPTS[1]]
        copy = shutil.copytree(sound, tmp_path / "copy")
        done(cluster, cluster.controller.update(str(copy)))
        assert write(cluster, PROMPTS[2]).ids == alone[PROMPTS[2]]
