"""Registers moecluster in transformers' experts registry, and attaches a model's experts modules to it.

Every experts module of a family that uses the registry is a class decorated with `use_experts_implementation`; its
forward looks up `config._experts_implementation`. Families that do not use the registry silently ignore the setting, so
attach fails if it finds no such module.
"""

import re
from collections import Counter
from typing import Protocol

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moecluster.errors import UnsupportedModelError
from moecluster.hf.shard import first_projection
from moecluster.types import MoeLayer

BACKEND_NAME = "moecluster"

# MoE families of transformers 5 that do not call their experts through the registry.
UNATTACHABLE_FAMILIES = frozenset(
    ("dbrx", "doge", "jetmoe", "llama4", "llama4_text", "longcat_flash", "nllb-moe", "step3p7", "switch_transformers")
)

# Attributes that the decorator sets on every experts module; no other module has all of them.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "config")


class Backend(Protocol):
    """Computes the experts of an MoE layer for a trunk."""

    def __call__(self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Returns y_TD in x_TD's dtype: for each token the sum over k of weights_TK times the expert's output.

        weights_TK may have another dtype than x_TD. An index >= E is skipped.
        """


def register_backend() -> None:
    """Registers `experts_implementation="moecluster"` with transformers. Idempotent."""
    if BACKEND_NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(BACKEND_NAME, _call_backend)


def _call_backend(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The registered function. The registry dictates its parameter names."""
    backend: Backend | None = module.__dict__.get("moecluster_backend")
    if backend is None:
        raise UnsupportedModelError(
            f'{type(module).__name__} runs with experts_implementation="{BACKEND_NAME}" but is not attached: '
            "load the model with moecluster.models.trunk.load_trunk"
        )
    y_TD: torch.Tensor = backend(module.__dict__["moecluster_layer"], hidden_states, top_k_index, top_k_weights)
    return y_TD


def find_experts(model: nn.Module) -> list[tuple[int, str, nn.Module]]:
    """Returns all experts modules as (layer, qualified name, module), in the model's order.

    The layer is the first number in the module's path (the decoder layer's number, so dense layers leave gaps). If two
    experts modules share a number (several decoders in one model), layers are numbered from 0 in order instead.
    """
    found = [(name, module) for name, module in model.named_modules() if all(m in vars(module) for m in _MARKS)]
    numbers = [_first_number(name) for name, _ in found]
    unique = None not in numbers and max(Counter(numbers).values(), default=1) == 1
    layers = numbers if unique else range(len(found))
    return [(int(layer or 0), name, module) for layer, (name, module) in zip(layers, found, strict=True)]


def _first_number(name: str) -> int | None:
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else None


def moe_layers(model: nn.Module) -> tuple[MoeLayer, ...]:
    """Returns the MoE layers of a model. Raises UnsupportedModelError if none can be attached."""
    found = find_experts(model)
    if not found:
        family = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        refuse_unattachable(family)
        raise UnsupportedModelError(
            f"a {family} model cannot be attached: it has no Mixture-of-Experts layer that uses transformers' experts "
            "interface; take an MoE model such as mixtral, qwen3_moe, deepseek_v3, olmoe or gpt_oss"
        )
    return tuple(
        MoeLayer(layer=layer, num_experts=_num_experts(module), hidden_size=_row_width(module), name=name)
        for layer, name, module in found
    )


def refuse_unattachable(family: str) -> None:
    """Raises UnsupportedModelError for a model_type that is known not to use transformers' experts interface."""
    if family in UNATTACHABLE_FAMILIES:
        raise UnsupportedModelError(
            f"a {family} model cannot be attached: the family computes its experts without transformers' experts "
            "interface; take one that uses it, such as mixtral, qwen3_moe, deepseek_v3, olmoe or gpt_oss"
        )


def attach(model: nn.Module, backend: Backend) -> tuple[MoeLayer, ...]:
    """Makes every experts module of the model call the backend. Returns the layers in order.

    Raises UnsupportedModelError if there is no such module: the family would silently run its own experts.
    """
    register_backend()
    layers = moe_layers(model)
    for layer, _, module in find_experts(model):
        # Not setattr: a backend that is an nn.Module would become a submodule of the model.
        object.__setattr__(module, "moecluster_backend", backend)
        object.__setattr__(module, "moecluster_layer", layer)
        _config_of(module)._experts_implementation = BACKEND_NAME
    return layers


def _config_of(module: nn.Module):  # type: ignore[no-untyped-def]  # a PreTrainedConfig, untyped upstream
    return module.__dict__["config"]


def _num_experts(module: nn.Module) -> int:
    return int(module.__dict__["num_experts"])


def _row_width(module: nn.Module) -> int:
    """Returns the width of the experts' input rows, from their shapes, or as stored in a stripped module."""
    width = module.__dict__.get("moecluster_width")
    return int(width) if width is not None else row_width(module)


def row_width(module: nn.Module) -> int:
    """Returns the width D of an experts module from its parameters, `[E, F, D]` or transposed `[E, D, F]`, or else from
    its `hidden_dim`."""
    weight = dict(module.named_parameters(recurse=False)).get(first_projection(module))
    if weight is None:  # the native family: a list of experts, each a module
        return int(module.__dict__["hidden_dim"])
    return int(weight.shape[1] if module.__dict__["is_transposed"] else weight.shape[2])
