"""Builds fresh native models, whole or in matching parts.

Each module's parameters are drawn under a seed of its own, from (seed, module name). So a trunk in one process and
experts in others start with exactly the weights of the whole model built in one process.
"""

import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moecluster.config.sections import ModelConfig
from moecluster.hf.modelling import MODEL_BUILDING, strip_experts
from moecluster.models.native.configuration import NativeConfig, native_config
from moecluster.models.native.modeling import NativeForCausalLM, NativeModel, NativePreTrainedModel
from moecluster.moe.experts.base import Expert
from moecluster.moe.experts.registry import make_expert
from moecluster.types import ExpertId


def register_native_family() -> None:
    """Registers `model_type: "moecluster"` with transformers' Auto classes. Idempotent."""
    AutoConfig.register(NativeConfig.model_type, NativeConfig, exist_ok=True)
    AutoModel.register(NativeConfig, NativeModel, exist_ok=True)
    AutoModelForCausalLM.register(NativeConfig, NativeForCausalLM, exist_ok=True)


def empty_native_model(model: ModelConfig) -> NativeForCausalLM:
    """Returns the model on the meta device: shapes without memory. This also checks its settings.

    Raises ConfigError for an unknown gate, gate option, expert kind or activation.
    """
    with torch.device("meta"):
        return NativeForCausalLM(native_config(model))


def build_model(model: ModelConfig, seed: int, *, with_experts: bool = True) -> NativeForCausalLM:
    """Returns a fresh model on the CPU, in training mode. Gates are float32 whatever the model's dtype.

    Without experts, no expert ever takes memory, and the model must be attached before it runs.
    Raises ConfigError like `empty_native_model`.
    """
    built = empty_native_model(model)
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
    """Returns a fresh expert on the CPU, equal to the same expert of `build_model` with the same seed."""
    built = make_expert(
        model.expert_kind,
        hidden_size=model.hidden_size,
        inner_size=model.expert_inner_size,
        activation=model.activation,
    )
    family = NativePreTrainedModel(native_config(model))
    prefix = f"model.layers.{expert.layer}.mlp.experts.{expert.index}"
    _initialize(built, family._init_weights, seed=seed, prefix=prefix)
    return built.to(getattr(torch, model.dtype))


def _initialize(model: nn.Module, init: Callable[[nn.Module], None], *, seed: int, prefix: str = "") -> None:
    """Calls `init` on every module, each under its own seed."""
    for name, module in model.named_modules(prefix=prefix):
        key = np.random.SeedSequence((seed, zlib.crc32(name.encode())))
        with MODEL_BUILDING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
            init(module)
