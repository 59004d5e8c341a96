"""Makes a tiny config for any family of transformers: its class's defaults, with every size made small."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.models.families import FAMILIES, SEE_PADDING, make_config

VOCABULARY = 320  # large enough for all bytes and special tokens

# Setting name -> small value. A config gets only the settings that its class has.
_SMALL: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "dense_intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "sliding_window": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    # Vision and audio parts.
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}

_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR_AND_INDEXED = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_DENSE_AND_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_SMALL_WINDOWS = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "layer_types": ["hybrid_sliding", "hybrid"],
}

# model_type -> further settings that the family needs.
_FURTHER: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"linear_head_dim": 8, "linear_num_heads": 4, **_LINEAR_AND_FULL},
    "beam": _DENSE_AND_SPARSE,
    "flint": {"mlp_only_layers": [0], **_SLIDING_AND_FULL},
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "dense"],
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
    },
    "dots3_note_audio_encoder": {
        "downsample_hidden_size": 16,
        "adapter_input_size": 32,
        "adapter_out_dim": 32,
        "feature_size": 16,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        **_SLIDING_AND_FULL,
    },
    "glm5_next_text": {**_SPARSE, **_LINEAR_AND_FULL, "index_kpool": 2},
    "granitemoehybrid": _LINEAR_AND_FULL,
    "inkling_text": _SMALL_WINDOWS,
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY, **_SMALL_WINDOWS},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, **_SPARSE, **_LINEAR_AND_FULL},
    "kolibri1": _SLIDING_AND_FULL,
    "minimax_m3_vl_text": {
        "rotary_dim": 4,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "qwen3_5_moe_text": _LINEAR_AND_FULL,
    "qwen4_exp_text": {"ple_embed_dim": 32, "ngram_vocab_size_base": 64, "hc_lowrank": 8, **_LINEAR_AND_INDEXED},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str) -> PreTrainedConfig:
    """Returns a tiny config for a model_type. A family that the tests have gets their config, with room for the byte
    tokenizer."""
    if family in FAMILIES or family in SEE_PADDING:
        return make_config(family, vocab_size=VOCABULARY)
    return _tiny(CONFIG_MAPPING[family])


def _tiny(config_class: Any) -> PreTrainedConfig:
    names = vars(config_class()).keys() | config_class.attribute_map.keys()
    settings = {name: value for name, value in _SMALL.items() if name in names}
    if "kv_lora_rank" in settings:  # latent attention has keys for every head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= _FURTHER.get(config_class.model_type, {})
    parts = {name: _tiny(part) for name, part in config_class.sub_configs.items() if part is not AutoConfig}
    config: PreTrainedConfig = config_class(**settings, **parts)
    return config
