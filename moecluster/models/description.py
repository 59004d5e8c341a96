"""Describes a model from its config alone: layers, experts, total and active parameters."""

import copy
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig

from moecluster.errors import UnsupportedModelError
from moecluster.hf.modelling import empty_model
from moecluster.models.config import read_model_config

# The families' names for K, the experts per token.
_TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "top_k")

# Families with one module per expert -> the setting for their number. Building thousands of modules is slow even on the
# meta device.
_MODULE_PER_EXPERT = {"switch_transformers": "num_experts"}

_EXPERTS_IN_NAME = re.compile(r"^(.*?\.experts)\.")


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Number of parameters of a model. Tied ones count once."""

    trunk: int
    experts: tuple[int, ...]  # all experts of each MoE layer, in the model's order

    @property
    def total(self) -> int:
        return self.trunk + sum(self.experts)


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """The sizes of an MoE model."""

    family: str
    num_layers: int
    num_moe_layers: int
    num_experts: int  # of each MoE layer
    top_k: int
    hidden_size: int
    total_parameters: int
    active_parameters: int  # per token: the trunk, embeddings included, and top_k experts of each layer
    expert_parameters: int  # of one expert


def describe(path_or_config: str | Path | PreTrainedConfig) -> ModelDescription:
    """Describes a model directory (config.json is enough) or a config. Allocates no weights.

    Raises CheckpointError if the directory has no config.json, UnsupportedModelError if the model is not an MoE.
    """
    config = path_or_config if isinstance(path_or_config, PreTrainedConfig) else read_model_config(path_or_config)
    text = config.get_text_config()
    num_experts = _num_experts(text)
    count = _count(config)
    if num_experts is None or not count.experts:
        raise UnsupportedModelError(f"a {config.model_type} model with this configuration is no Mixture of Experts")
    top_k = min(_top_k(text), num_experts)
    idle = sum(held // num_experts * (num_experts - top_k) for held in count.experts)
    return ModelDescription(
        family=config.model_type,
        num_layers=int(text.num_hidden_layers),
        num_moe_layers=len(count.experts),
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=int(text.hidden_size),
        total_parameters=count.total,
        active_parameters=count.total - idle,
        expert_parameters=count.experts[0] // num_experts,
    )


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts the parameters of a model on any device. Those below a module named `experts` count as experts'."""
    trunk = 0
    experts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        match = _EXPERTS_IN_NAME.match(name)
        if match:
            experts[match.group(1)] += parameter.numel()
        else:
            trunk += parameter.numel()
    return ParameterCount(trunk=trunk, experts=tuple(experts.values()))


def _count(config: PreTrainedConfig) -> ParameterCount:
    setting = _MODULE_PER_EXPERT.get(config.model_type)
    if setting is None:
        return count_parameters(empty_model(config))
    # Each further expert adds the same number of parameters to experts and gates, so two small models suffice.
    one, two = (count_parameters(empty_model(_with(config, setting, number))) for number in (1, 2))
    further = getattr(config, setting) - 1
    return ParameterCount(
        trunk=one.trunk + further * (two.trunk - one.trunk),
        experts=tuple(a + further * (b - a) for a, b in zip(one.experts, two.experts, strict=True)),
    )


def _with(config: PreTrainedConfig, setting: str, value: int) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    setattr(changed, setting, value)
    return changed


def _num_experts(config: PreTrainedConfig) -> int | None:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value), None)


def _top_k(config: PreTrainedConfig) -> int:
    """Returns the experts per token; the first layer's if given per layer. Switch has no such setting: always 1."""
    if config.model_type == "switch_transformers":
        return 1
    value = next((value for name in _TOP_K_NAMES if (value := getattr(config, name, None)) is not None), None)
    if isinstance(value, (list, tuple)):
        value = value[0]
    if not isinstance(value, int):
        raise UnsupportedModelError(f"a {config.model_type} configuration does not say how many experts a token takes")
    return value
