"""What a model is, from its configuration alone: layers, experts, parameters in all and those that a token meets."""

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

# What families call K, the experts per token.
_TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "top_k")

# Families with a module per expert and the setting that counts them: building thousands takes long even without memory.
_MODULE_PER_EXPERT = {"switch_transformers": "num_experts"}

_EXPERTS_IN_NAME = re.compile(r"^(.*?\.experts)\.")


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model; tied ones count once."""

    trunk: int
    experts: tuple[int, ...]  # all experts of each MoE layer, in the model's order

    @property
    def total(self) -> int:
        return self.trunk + sum(self.experts)


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A Mixture of Experts in figures."""

    family: str
    num_layers: int
    num_moe_layers: int
    num_experts: int  # of each MoE layer
    top_k: int
    hidden_size: int
    total_parameters: int
    active_parameters: int  # that one token meets: the trunk, embeddings included, and top_k experts of each layer
    expert_parameters: int  # of one expert


def describe(path_or_config: str | Path | PreTrainedConfig) -> ModelDescription:
    """Describes a model directory (its config.json is enough) or a configuration; allocates no weight.

    Raises CheckpointError for a directory without config, UnsupportedModelError for a model that is no MoE.
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
    """Counts a model on any device. Whatever stands below a module named `experts` is an expert's."""
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
    # Experts and gates both grow by the same number of parameters with each expert: two small models tell them all.
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
    """Experts per token; of families that give one per layer, the first. Switch has no setting for it: always one."""
    if config.model_type == "switch_transformers":
        return 1
    value = next((value for name in _TOP_K_NAMES if (value := getattr(config, name, None)) is not None), None)
    if isinstance(value, (list, tuple)):
        value = value[0]
    if not isinstance(value, int):
        raise UnsupportedModelError(f"a {config.model_type} configuration does not say how many experts a token takes")
    return value
