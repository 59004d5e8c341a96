"""A trunk with its experts loaded one by one equals the whole model: every family, both checkpoint layouts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from moecluster.models.experts.layout import ExpertLayout, join_experts
from moecluster.models.experts.source import ExpertSource
from moecluster.models.trunk import checkpoint_state
from moecluster.types import ExpertId
from tests.support.models.families import FAMILIES, LAYOUTS, Layout, make_model, save
from tests.support.models.parity import (
    GRADIENT_TOLERANCE,
    LOGIT_TOLERANCE,
    LocalExperts,
    Outcome,
    assert_same_outcome,
    expert_gradients,
    largest_difference,
    load_routed,
    run_model,
)

Reference = tuple[PreTrainedModel, Outcome]


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request: pytest.FixtureRequest) -> Reference:
    model = make_model(request.param)
    return model, run_model(model)


@pytest.fixture
def saved(tmp_path: Path, reference: Reference) -> Callable[[Layout], Path]:
    def write(layout: Layout) -> Path:
        save(reference[0], tmp_path, layout)
        return tmp_path

    return write


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routed_model_equals_whole_model(reference: Reference, saved: Callable[[Layout], Path], layout: Layout) -> None:
    model, expected = reference
    experts = LocalExperts(saved(layout))
    routed = load_routed(saved(layout), experts)
    assert not any(".experts." in name for name, _ in routed.named_parameters())

    assert_same_outcome(run_model(routed), expected)

    for layer in experts.source.layers:
        for index in range(layer.num_experts):
            ours = experts.experts[ExpertId(layer=layer.layer, index=index)]
            for name, gradient in expert_gradients(model, layer.name, index).items():
                got = ours.get_parameter(name).grad
                got = torch.zeros_like(gradient) if got is None else got
                assert largest_difference(got, gradient) <= GRADIENT_TOLERANCE, f"{layer.name} {index} {name}"


def test_one_expert_perturbed_by_a_hundredth_is_noticed(reference: Reference, saved: Callable[[Layout], Path]) -> None:
    _, expected = reference
    experts = LocalExperts(saved("fused"))
    layer = experts.source.layers[0]
    routed = load_routed(saved("fused"), experts)
    run_model(routed)
    hit = next(e for e, module in experts.experts.items() if next(module.parameters()).grad is not None)
    assert hit.layer == layer.layer
    with torch.no_grad():
        for parameter in experts.experts[hit].parameters():
            parameter.mul_(1.01)
    assert largest_difference(run_model(routed).logits, expected.logits) > LOGIT_TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trunk_and_experts_saved_apart_load_as_one_model(
    reference: Reference, saved: Callable[[Layout], Path], layout: Layout, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """transformers alone reads back what source and trunk export, every weight bit for bit."""
    model, _ = reference
    experts = LocalExperts(saved(layout))
    content = ExpertLayout(model.config)
    routed = load_routed(saved(layout), experts)
    state = checkpoint_state(routed) | join_experts(
        [content.checkpoint_state(e, dict(module.named_parameters())) for e, module in sorted(experts.experts.items())]
    )
    directory = tmp_path_factory.mktemp("joined")
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(directory)

    again = type(model).from_pretrained(directory, experts_implementation="eager")

    weights = dict(again.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter), name


def test_expert_bytes_add_up_to_the_experts_of_the_model(reference: Reference, saved: Callable[[Layout], Path]) -> None:
    model, _ = reference
    source = ExpertSource(saved("per-expert"))
    held = sum(
        source.expert_bytes(ExpertId(layer=layer.layer, index=index))
        for layer in source.layers
        for index in range(layer.num_experts)
    )
    assert held == sum(4 * p.numel() for layer in source.layers for p in model.get_submodule(layer.name).parameters())
