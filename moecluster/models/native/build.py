"""Models of our own family made from nothing, whole or in parts that fit together.

Every parameter is drawn from a generator of its own, seeded by (seed, its module's name). So a trunk without experts in
one process and experts in others begin exactly like the whole model in one process.
"""

import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moecluster.config.sections import ModelConfig
from moecluster.hf.modelling import MODEL_BUILDING, strip_experts
from moecluster.models.native.configuration import OwnConfig, own_config
from moecluster.models.native.modeling import OwnForCausalLM, OwnModel, OwnPreTrainedModel
from moecluster.moe.experts.base import Expert
from moecluster.moe.experts.registry import make_expert
from moecluster.types import ExpertId


def register_own_family() -> None:
    """Makes `model_type: "moecluster"` known to transformers' Auto classes. Repeated calls change nothing."""
    AutoConfig.register(OwnConfig.model_type, OwnConfig, exist_ok=True)
    AutoModel.register(OwnConfig, OwnModel, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM, exist_ok=True)


def empty_own_model(model: ModelConfig) -> OwnForCausalLM:
    """The model on the meta device: shapes without memory, and the check of its settings before anything starts.

    Raises ConfigError: no such gate, gate option, expert kind or activation.
    """
    with torch.device("meta"):
        return OwnForCausalLM(own_config(model))


def build_model(model: ModelConfig, seed: int, *, with_experts: bool = True) -> OwnForCausalLM:
    """A fresh model on the CPU, in training mode; gates in float32 whatever the model's dtype.

    Without experts, none of them ever takes memory, and the model must be attached before it runs.
    Raises ConfigError as `empty_own_model` does.
    """
    built = empty_own_model(model)
    if not with_experts:
        strip_experts(built)
    built.to_empty(device="cpu")
    built.tie_weights()
    _initialize(built, built._init_weights, seed=seed)
    for name, parameter in built.named_parameters():  # not the buffers: rotary frequencies stay in float32
        if ".mlp.gate." not in name:
            parameter.data = parameter.data.to(getattr(torch, model.dtype))
    built.train()
    return built


def build_expert(model: ModelConfig, expert: ExpertId, seed: int) -> Expert:
    """A fresh expert on the CPU, equal to the one that stands at its place in `build_model` with the same seed."""
    built = make_expert(
        model.expert_kind,
        hidden_size=model.hidden_size,
        inner_size=model.expert_inner_size,
        activation=model.activation,
    )
    family = OwnPreTrainedModel(own_config(model))
    prefix = f"model.layers.{expert.layer}.mlp.experts.{expert.index}"
    _initialize(built, family._init_weights, seed=seed, prefix=prefix)
    return built.to(getattr(torch, model.dtype))


def _initialize(model: nn.Module, init: Callable[[nn.Module], None], *, seed: int, prefix: str = "") -> None:
    """Call `init` on every module, each under its own seed."""
    for name, module in model.named_modules(prefix=prefix):
        key = np.random.SeedSequence((seed, zlib.crc32(name.encode())))
        with MODEL_BUILDING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
            init(module)
