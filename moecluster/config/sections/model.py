"""Settings of the section [model]."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from moecluster.config.fields import Section, setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The model: a Hugging Face checkpoint (`path`), or the architecture of a new model of the native family."""

    section: ClassVar[str] = "model"

    path: str = setting(
        "",
        "Directory of a Hugging Face checkpoint, which then defines the architecture. Empty: a new model with the"
        " settings below.",
    )
    dtype: str = setting(
        "float32",
        "Data type of parameters and activations. float16 can be served but not trained.",
        choices=("float32", "bfloat16", "float16"),
    )
    vocab_size: int = setting(
        259,
        "Number of token ids. The default fits the byte tokenizer: 256 bytes and the begin, end and padding tokens.",
        minimum=1,
    )
    hidden_size: int = setting(128, "Width D of the trunk. Must be a multiple of 2 * num_heads.", minimum=1)
    num_layers: int = setting(4, "Decoder layers.", minimum=1)
    num_heads: int = setting(4, "Attention heads.", minimum=1)
    num_kv_heads: int = setting(2, "Key and value heads of grouped-query attention. Must divide num_heads.", minimum=1)
    max_positions: int = setting(1024, "Maximum sequence length in tokens.", minimum=1)
    rope_theta: float = setting(10000.0, "Base of the rotary position embedding.", above=0)
    initializer_range: float = setting(0.02, "Standard deviation of newly initialized weight matrices.", above=0)
    tie_embeddings: bool = setting(False, "Use the input embedding as the output head.")
    gate: str = setting(
        "mixtral",
        "Gate: the routing network that selects the experts of each token. See [gate options](#gate-options).",
    )
    gate_options: Mapping[str, Any] = setting({}, "Options of the gate, for example `{ router_aux_loss_coef = 0.02 }`.")
    num_experts: int = setting(8, "Routed experts E of each MoE layer.", minimum=1)
    top_k: int = setting(2, "Experts K that each token visits. At most num_experts.", minimum=1)
    expert_kind: str = setting("glu", "What an expert computes: glu (gated, three matrices) or ffn (two matrices).")
    expert_inner_size: int = setting(256, "Inner width F of an expert.", minimum=1)
    activation: str = setting("silu", "Activation function of experts and dense layers: silu, gelu or relu.")
    num_shared_experts: int = setting(
        0, "Shared experts, which every token visits. They are part of the trunk.", minimum=0
    )
    moe_every: int = setting(
        1, "Every n-th decoder layer is an MoE layer: layer i, counted from 0, if n divides i + 1.", minimum=1
    )
    first_dense_layers: int = setting(0, "Leading decoder layers that are dense regardless of moe_every.", minimum=0)
    dense_inner_size: int = setting(512, "Inner width of the dense layers.", minimum=1)

    def check(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise self.complain("hidden_size", f"expected a multiple of 2 * num_heads = {2 * self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise self.complain("num_kv_heads", f"expected a divisor of num_heads = {self.num_heads}")
        if self.top_k > self.num_experts:
            raise self.complain("top_k", f"expected at most num_experts = {self.num_experts}")
        if not any(self.is_moe_layer(layer) for layer in range(self.num_layers)):
            raise self.complain(
                "moe_every",
                f"no layer is MoE: num_layers = {self.num_layers}, first_dense_layers = "
                f"{self.first_dense_layers}; expected moe_every in reach of a layer after the dense ones",
            )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a decoder layer, counted from 0, has experts."""
        return layer >= self.first_dense_layers and (layer + 1) % self.moe_every == 0
