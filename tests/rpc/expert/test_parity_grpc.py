"""Over real gRPC, every family equals its whole model: serving and training, in both checkpoint layouts.

Layouts and families alternate between shared memory and inline rows.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from moecluster.models.experts.source import ExpertSource
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.types import ExpertId, OptimizerSettings, StepTag
from tests.support.clusters.expert_cluster import ExpertCluster, Transport
from tests.support.models.families import FAMILIES, LAYOUTS, Layout, make_model, save
from tests.support.models.parity import (
    GRADIENT_TOLERANCE,
    LOGIT_TOLERANCE,
    Outcome,
    assert_same_outcome,
    batch_for,
    expert_gradients,
    generate_greedily,
    largest_difference,
    load_routed,
    run_model,
)

Reference = tuple[str, PreTrainedModel, Outcome]
TAG = StepTag(term=1, step=1, attempt=0)
SGD = OptimizerSettings(name="sgd")  # with learning rate 1 a step moves a parameter by its gradient


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request: pytest.FixtureRequest) -> Reference:
    model = make_model(request.param)
    return request.param, model, run_model(model)


def transport_of(family: str, layout: Layout) -> Transport:
    return "shm" if (list(FAMILIES).index(family) + LAYOUTS.index(layout)) % 2 else "inline"


def experts_of(directory: Path) -> list[ExpertId]:
    return [
        ExpertId(layer=layer.layer, index=index)
        for layer in ExpertSource(directory).layers
        for index in range(layer.num_experts)
    ]


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(batch_for()).logits
    return logits


def parameters_of(cluster: ExpertCluster, experts: list[ExpertId]) -> dict[tuple[ExpertId, str], torch.Tensor]:
    """The actors' parameters, as they export them."""
    found: dict[tuple[ExpertId, str], torch.Tensor] = {}
    for name, control in cluster.pool.controls().items():
        held = [expert for expert in experts if expert in cluster.placement.experts_on(name)]
        found |= {(t.expert, t.name): t.value for t in control.export(experts=held, with_optimizer=False)}
    return found


def take_step(cluster: ExpertCluster) -> None:
    """Plain SGD with learning rate 1, without clipping."""
    for name, control in cluster.pool.controls().items():
        control.reduce(TAG, cluster.remote.sent(TAG).get(name, []))
        control.prepare(TAG, clip_scale=1.0, learning_rate=1.0)
        control.commit(TAG)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_served_experts_give_the_whole_model_s_logits_and_text(
    reference: Reference, tmp_path: Path, layout: Layout
) -> None:
    family, model, expected = reference
    save(model, tmp_path, layout)
    with ExpertCluster(tmp_path, transport=transport_of(family, layout)) as cluster:
        routed = load_routed(tmp_path, cluster.remote)
        assert largest_difference(logits_of(routed), expected.logits) <= LOGIT_TOLERANCE
        with torch.no_grad():
            assert torch.equal(generate_greedily(routed, batch_for()[:, :5]), expected.tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_trunk_and_experts_equal_the_whole_model_s(
    reference: Reference, tmp_path: Path, layout: Layout
) -> None:
    family, model, expected = reference
    save(model, tmp_path, layout)
    experts = experts_of(tmp_path)
    with ExpertCluster(tmp_path, transport=transport_of(family, layout), optimizer=SGD) as cluster:
        routed = load_routed(tmp_path, cluster.remote)
        with cluster.remote.training(TAG):
            assert_same_outcome(run_model(routed), expected)
        before = parameters_of(cluster, experts)
        take_step(cluster)
        after = parameters_of(cluster, experts)

    names = {layer.layer: layer.name for layer in ExpertSource(tmp_path).layers}
    compared = 0
    for expert in experts:
        for name, gradient in expert_gradients(model, names[expert.layer], expert.index).items():
            moved = before[expert, name] - after[expert, name]
            assert largest_difference(moved, gradient) <= GRADIENT_TOLERANCE, f"{expert} {name}"
            compared += bool(gradient.abs().max() > 10 * GRADIENT_TOLERANCE)
    assert compared > 0, "gradients large enough to tell"


def test_one_expert_perturbed_by_a_hundredth_is_noticed(reference: Reference, tmp_path: Path) -> None:
    """Negative control: the comparison fails if one actor serves a slightly different expert."""
    family, model, expected = reference
    save(model, tmp_path / "true", "fused")
    with ExpertCluster(tmp_path / "true", transport=transport_of(family, "fused")) as cluster:
        routed = load_routed(tmp_path / "true", cluster.remote)
        assert largest_difference(logits_of(routed), expected.logits) <= LOGIT_TOLERANCE
        layer, counts_E = min(cluster.remote.loads.snapshot().items())
        busiest = ExpertId(layer=layer, index=int(counts_E.argmax()))

        name = next(record.name for record in ExpertSource(tmp_path / "true").layers if record.layer == layer)
        save(perturbed(model, name, busiest.index), tmp_path / "perturbed", "fused")
        (actor,) = (replica.actor for replica in cluster.placement.replicas_of(busiest))
        cluster.pool.controls()[actor].load(
            LoadRequest(term=1, experts=(busiest,), checkpoint=str(tmp_path / "perturbed"), replace=True)
        )
        assert largest_difference(logits_of(routed), expected.logits) > LOGIT_TOLERANCE


@torch.no_grad()
def perturbed(model: PreTrainedModel, layer_name: str, index: int) -> PreTrainedModel:
    """A copy with one expert's parameters 1 % larger."""
    twin = copy.deepcopy(model)
    experts = twin.get_submodule(layer_name)
    if isinstance(experts, nn.ModuleList):  # the native family
        for parameter in experts[index].parameters():
            parameter.mul_(1.01)
    else:
        for parameter in experts.parameters(recurse=False):
            parameter[index].mul_(1.01)
    return twin
