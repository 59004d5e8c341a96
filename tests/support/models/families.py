"""Tiny random-weight models of Hugging Face MoE families and our own, and their two checkpoint layouts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moecluster.models.native.build import register_native_family

Layout = Literal["per-expert", "fused"]
LAYOUTS: tuple[Layout, ...] = ("per-expert", "fused")

VOCABULARY = 128

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_FOUR_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
_FOUR_NARROW = {**_FOUR, "moe_intermediate_size": 24}
_EIGHT_GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_hidden_layers": 3,
}
_LATENT_ATTENTION = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}

# model_type -> settings that differ from the common ones.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": _FOUR_LOCAL,
    "qwen2_moe": {**_FOUR_NARROW, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**_FOUR_NARROW, "head_dim": 8, "norm_topk_prob": True},
    "deepseek_v2": {**_EIGHT_GROUPED, **_LATENT_ATTENTION, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_EIGHT_GROUPED, **_LATENT_ATTENTION},
    "olmoe": _FOUR,
    "gpt_oss": {
        **_FOUR_LOCAL,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "phimoe": _FOUR_LOCAL,
    "granitemoe": _FOUR_LOCAL,
    "granitemoeshared": {**_FOUR_LOCAL, "shared_intermediate_size": 24},
    "glm4_moe": {**_EIGHT_GROUPED, "head_dim": 8},
    "minimax_m2": {**_FOUR_LOCAL, "head_dim": 8, "rotary_dim": 4},
    "jamba": {
        **_FOUR,
        "num_hidden_layers": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
    },
    "nemotron_h": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
        "num_hidden_layers": 4,
        "layers_block_type": ["attention", "moe", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "dots1": {**_EIGHT_GROUPED, "head_dim": 8, "layer_types": ["full_attention"] * 3},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "lfm2_moe": {**_FOUR_NARROW, "num_dense_layers": 1, "layer_types": ["full_attention", "conv"]},
    "flex_olmo": _FOUR,
    "qwen3_next": {
        **_FOUR_NARROW,
        "head_dim": 8,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["full_attention", "full_attention"],
    },
    "afmoe": {
        **_FOUR_NARROW,
        "head_dim": 8,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "layer_types": ["full_attention"] * 2,
    },
    "solar_open": {**_EIGHT_GROUPED, "head_dim": 8, "num_hidden_layers": 2},
    "glm4_moe_lite": {**_EIGHT_GROUPED, **_LATENT_ATTENTION},
    "exaone_moe": {**_FOUR_NARROW, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    "hy_v3": {**_FOUR_NARROW, "head_dim": 8},
    "mimo_v2_flash": {**_EIGHT_GROUPED, "head_dim": 8, "num_hidden_layers": 2},
    "minimax": {**_FOUR_LOCAL, "head_dim": 8, "block_size": 8},
    "cohere2_moe": _FOUR_NARROW,
    "laguna": {**_FOUR_NARROW, "head_dim": 8},
    "mellum": {**_FOUR_NARROW, "head_dim": 8},
    "moecluster": {**_FOUR_NARROW, "moe_layers": [1], "gate": "mixtral"},  # the native family, with one dense layer
}
# Families whose rows depend on a batch's padding: only the serving tests use them.
SEE_PADDING: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v32": {
        **_EIGHT_GROUPED,
        **_LATENT_ATTENTION,
        "index_topk": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
    "deepseek_v4": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_lora_rank": 16,
        "o_groups": 2,
        "index_topk": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["moe", "moe"],
    },
    "glm_moe_dsa": {
        **_EIGHT_GROUPED,
        **_LATENT_ATTENTION,
        "index_topk": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
}


def make_config(family: str, **settings: Any) -> PreTrainedConfig:
    register_native_family()
    return AutoConfig.for_model(family, **{**_COMMON, **{**FAMILIES, **SEE_PADDING}[family], **settings})


def make_model(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A float32 model in evaluation mode that runs its experts with transformers' own eager loop.

    Redraws every parameter, wide enough that experts, gates and biases matter: families initialize differently.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        make_config(family, **settings), experts_implementation="eager"
    )
    draw_weights(model, seed)
    model.eval()
    return model


def draw_weights(model: PreTrainedModel, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.ndim > 1 else parameter + noise * 0.05)


def save(model: PreTrainedModel, directory: str | Path, layout: Layout) -> None:
    """Writes a safetensors directory. Families without keys per expert write fused keys in both layouts."""
    model.save_pretrained(str(directory), save_original_format=layout == "per-expert")
