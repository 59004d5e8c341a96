"""The central comparison of the project: a trunk with remote experts equals the whole model in one process.

The same checks run with local experts, over gRPC and in a cluster, each with its own backend.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moecluster.hf.interface import Backend
from moecluster.models.checkpoint.reader import Checkpoint
from moecluster.models.experts.source import ExpertSource
from moecluster.models.trunk import load_trunk
from moecluster.types import ExpertId
from tests.support.models.families import VOCABULARY

LOGIT_TOLERANCE = 5e-6  # float32
GRADIENT_TOLERANCE = 2e-5
NEW_TOKENS = 6


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A model's results for one fixed batch."""

    logits: torch.Tensor
    gradients: Mapping[str, torch.Tensor]  # of the trunk, by parameter name
    tokens: torch.Tensor  # greedy continuation


class LocalExperts:
    """A backend that loops over experts in this process, each read separately from the checkpoint."""

    def __init__(self, directory: str | Path) -> None:
        self.source = ExpertSource(directory)
        self.experts: dict[ExpertId, nn.Module] = {
            expert: self.source.load(expert)
            for expert in (
                ExpertId(layer=layer.layer, index=index)
                for layer in self.source.layers
                for index in range(layer.num_experts)
            )
        }

    def __call__(self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        y_TD = torch.zeros_like(x_TD)
        for index in ids_TK.unique().tolist():
            expert = self.experts.get(ExpertId(layer=layer, index=index))
            if expert is None:  # a skipped assignment
                continue
            rows, positions = torch.where(ids_TK == index)
            y_TD = y_TD.index_add(0, rows, expert(x_TD[rows]) * weights_TK[rows, positions, None])
        return y_TD


def batch_for(seed: int = 0) -> torch.Tensor:
    """Returns token ids [2, 9], without special tokens."""
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))


def run_model(model: PreTrainedModel) -> Outcome:
    """Computes logits, gradients of a fixed loss, and a greedy continuation."""
    ids = batch_for()
    model.zero_grad()
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    with torch.no_grad():
        tokens = generate_greedily(model, ids[:, :5])
    return Outcome(logits=logits.detach(), gradients=gradients, tokens=tokens)


def generate_greedily(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """model: with transformers' GenerationMixin, which its model classes do not declare."""
    tokens: torch.Tensor = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokens


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def assert_same_outcome(ours: Outcome, reference: Outcome) -> None:
    """Compares logits, trunk gradients and greedy tokens of a routed model with those of the whole model."""
    assert largest_difference(ours.logits, reference.logits) <= LOGIT_TOLERANCE
    assert ours.gradients.keys() == {name for name in reference.gradients if ".experts." not in name}
    for name, gradient in ours.gradients.items():
        assert largest_difference(gradient, reference.gradients[name]) <= GRADIENT_TOLERANCE, name
    assert torch.equal(ours.tokens, reference.tokens)


def expert_gradients(model: PreTrainedModel, layer_name: str, index: int) -> dict[str, torch.Tensor]:
    """Returns the gradients of one expert in the whole model, by parameter name."""
    experts = model.get_submodule(layer_name)
    if isinstance(experts, nn.ModuleList):  # the native family
        return {
            name: parameter.grad for name, parameter in experts[index].named_parameters() if parameter.grad is not None
        }
    return {
        name: parameter.grad[index]
        for name, parameter in experts.named_parameters(recurse=False)
        if parameter.grad is not None
    }


def no_experts(layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """A backend whose layers answer zeros."""
    return torch.zeros_like(x_TD)


def load_routed(directory: str | Path | Checkpoint, backend: Backend) -> PreTrainedModel:
    model = load_trunk(directory, backend)
    model.eval()
    return model
