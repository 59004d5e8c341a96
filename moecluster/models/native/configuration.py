"""The transformers config of the native family."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from moecluster.config.sections import ModelConfig
from moecluster.models.tokenizer.byte_level import BEGIN_ID, END_ID, PAD_ID, VOCAB_SIZE


class NativeConfig(PreTrainedConfig):
    """A Mixtral-like trunk with a choice of gate and expert kind. Fields have transformers' names."""

    model_type: ClassVar[str] = "moecluster"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    default_theta = 10000.0  # transformers uses it if rope_parameters is not set

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 1024
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    sliding_window: int | None = None
    hidden_act: str = "silu"
    intermediate_size: int = 512  # of the dense layers
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    moe_layers: list[int] | tuple[int, ...] = (0, 1, 2, 3)  # decoder layers that have experts, counted from 0
    gate: str = "mixtral"
    gate_options: dict[str, Any] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    expert_kind: str = "glu"
    moe_intermediate_size: int = 256
    num_shared_experts: int = 0


def native_config(model: ModelConfig) -> NativeConfig:
    """Converts the [model] settings to a transformers config. The byte vocabulary also sets its special token ids."""
    is_bytes = model.vocab_size == VOCAB_SIZE
    return NativeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        hidden_act=model.activation,
        intermediate_size=model.dense_inner_size,
        initializer_range=model.initializer_range,
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=BEGIN_ID if is_bytes else None,
        eos_token_id=END_ID if is_bytes else None,
        pad_token_id=PAD_ID if is_bytes else None,
        moe_layers=[layer for layer in range(model.num_layers) if model.is_moe_layer(layer)],
        gate=model.gate,
        gate_options=dict(model.gate_options),
        num_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        expert_kind=model.expert_kind,
        moe_intermediate_size=model.expert_inner_size,
        num_shared_experts=model.num_shared_experts,
        dtype=model.dtype,
    )
