"""The native MoE language model: Mixtral's attention, norms and rotary embedding around moecluster's gates and experts.

B sequences, S positions, T = B * S tokens; other shape letters as in types/__init__.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralRMSNorm, MixtralRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from moecluster.models.native.configuration import NativeConfig
from moecluster.moe.experts.base import Expert
from moecluster.moe.experts.registry import make_expert
from moecluster.moe.gates.base import Gate, Routing
from moecluster.moe.gates.registry import make_gate


@dataclass(frozen=True, kw_only=True)
class TokenMarks:
    """Per-token inputs of gates besides the hidden states."""

    input_ids_T: torch.Tensor | None  # int64; None if the caller gave embeddings
    sequence_ids_T: torch.Tensor  # int64 in [0, B)
    valid_T: torch.Tensor | None  # bool, False at padding; None: all valid


@use_experts_implementation
class NativeExperts(nn.ModuleList):
    """The experts of one layer; their keys are `experts.{i}.<parameter>`."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__(
            make_expert(
                config.expert_kind,
                hidden_size=config.hidden_size,
                inner_size=config.moe_intermediate_size,
                activation=config.hidden_act,
            )
            for _ in range(config.num_experts)
        )
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size

    def forward(self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Returns y_TD: the weighted sum of each token's experts, added in float32 in the order of expert index."""
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for index, expert in enumerate(self):
            rows_n, choices_n = torch.where(ids_TK == index)
            if len(rows_n):
                weighted_nD = expert(x_TD[rows_n]).float() * weights_TK[rows_n, choices_n, None]
                y_TD = y_TD.index_add(0, rows_n, weighted_nD)
        return y_TD.to(x_TD.dtype)


class NativeMoeBlock(nn.Module):
    """Gate, routed experts, and shared experts that process every token."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        self.gate = make_gate(
            config.gate,
            hidden_size=config.hidden_size,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            **(config.gate_options or {}),
        )
        self.experts = NativeExperts(config)
        shared_size = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = _dense(config, shared_size) if shared_size else None

    def forward(self, x_BSD: torch.Tensor, marks: TokenMarks | None = None) -> tuple[torch.Tensor, Routing]:
        """Without marks, each row of the batch is one sequence, all tokens are valid, and their ids are unknown."""
        marks = marks or _token_marks(None, x_BSD.shape, None, x_BSD.device)
        x_TD = x_BSD.flatten(0, 1)
        routing: Routing = self.gate(
            x_TD, input_ids_T=marks.input_ids_T, sequence_ids_T=marks.sequence_ids_T, valid_T=marks.valid_T
        )
        y_TD = self.experts(x_TD, routing.ids_TK, routing.weights_TK)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(x_BSD), routing


def _dense(config: NativeConfig, inner_size: int) -> Expert:
    """Returns a dense feed-forward layer of the experts' kind."""
    return make_expert(
        config.expert_kind, hidden_size=config.hidden_size, inner_size=inner_size, activation=config.hidden_act
    )


class NativeDecoderLayer(nn.Module):
    """A pre-norm decoder layer: attention, then either experts or a dense feed-forward layer."""

    def __init__(self, config: NativeConfig, layer: int) -> None:
        super().__init__()
        self.is_moe = layer in config.moe_layers
        self.self_attn = MixtralAttention(config, layer)  # type: ignore[arg-type]  # it reads what NativeConfig has
        self.mlp = NativeMoeBlock(config) if self.is_moe else _dense(config, config.intermediate_size)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BSD: torch.Tensor, marks: TokenMarks, **attention: Any) -> tuple[torch.Tensor, Routing | None]:
        attended_BSD, _ = self.self_attn(hidden_states=self.input_layernorm(x_BSD), **attention)
        x_BSD = x_BSD + attended_BSD
        normed_BSD = self.post_attention_layernorm(x_BSD)
        if not self.is_moe:
            return x_BSD + self.mlp(normed_BSD), None
        y_BSD, routing = self.mlp(normed_BSD, marks)
        return x_BSD + y_BSD, routing


class NativePreTrainedModel(PreTrainedModel):
    """The family's settings for transformers."""

    config: NativeConfig
    config_class = NativeConfig
    base_model_prefix = "model"
    # The names and the mutable types are transformers' own.
    _no_split_modules = ["NativeDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [r"\.mlp\.gate\."]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gate):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.0 if module.zero_init else self.config.initializer_range)
            for buffer in module.buffers(recurse=False):
                nn.init.zeros_(buffer)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Defaults to eager: transformers' own default, grouped_mm, needs fused weights."""
        implementation: str = super().get_correct_experts_implementation(requested_experts or "eager")
        return implementation


class NativeModel(NativePreTrainedModel):
    """The trunk up to the final norm."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NativeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config)  # type: ignore[arg-type]  # it reads what NativeConfig has
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Cache | None, dict[int, Routing]]:
        """Returns (hidden states [B, S, D] after the final norm, the cache, layer -> its routing)."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            num_seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + num_seen
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        marks = _token_marks(input_ids, inputs_embeds.shape, attention_mask, inputs_embeds.device)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        x_BSD, routings = inputs_embeds, {}
        for index, layer in enumerate(self.layers):
            x_BSD, routing = layer(
                x_BSD,
                marks,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            if routing is not None:
                routings[index] = routing
        return self.norm(x_BSD), past_key_values, routings


def _token_marks(
    input_ids_BS: torch.Tensor | None, shape: torch.Size, attention_mask: Any, device: torch.device
) -> TokenMarks:
    """attention_mask: [B, S] or, with a cache, [B, earlier + S]. Masks of other shapes are not used to find padding."""
    num_sequences, num_positions = shape[:2]
    is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
    return TokenMarks(
        input_ids_T=None if input_ids_BS is None else input_ids_BS.flatten(),
        sequence_ids_T=torch.arange(num_sequences, device=device).repeat_interleave(num_positions),
        valid_T=attention_mask[:, -num_positions:].flatten().bool() if is_padding_mask else None,
    )


@dataclass(frozen=True, kw_only=True)
class LossParts:
    """The parts of a forward call's loss, without gradient."""

    cross_entropy: torch.Tensor | None  # None: no labels were given
    aux_losses: Mapping[str, torch.Tensor]  # kind -> auxiliary loss summed over all layers, times its coefficient


class NativeForCausalLM(NativePreTrainedModel, GenerationMixin):
    """The language model. Its loss includes the gates' losses. `last_routings` holds the last forward's routings."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  # transformers' own type

    def __init__(self, config: NativeConfig) -> None:
        super().__init__(config)
        self.model = NativeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.last_routings: dict[int, Routing] = {}  # layer -> routing without gradient
        self.last_losses = LossParts(cross_entropy=None, aux_losses={})
        self.post_init()

    def gates(self) -> dict[int, Gate]:
        """Returns layer -> gate, for `begin_micro_batch` and `after_step`."""
        return {index: layer.mlp.gate for index, layer in enumerate(self.model.layers) if layer.is_moe}

    def begin_micro_batch(self, *, seed: int, step: int, micro_batch: int) -> None:
        """Seeds the noise of all gates from these numbers."""
        for layer, gate in self.gates().items():
            gate.begin_micro_batch(seed=seed, step=step, micro_batch=micro_batch, layer=layer)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """labels: [B, S], shifted here; -100 is ignored. The output's aux_loss is the sum of the gates' losses and is
        part of its loss."""
        hidden_BSD, past_key_values, routings = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_BSD[:, kept])
        self.last_routings = {layer: _without_gradient(routing) for layer, routing in routings.items()}
        aux_losses = self._aux_losses(routings)
        aux_loss = torch.stack(list(aux_losses.values())).sum() if aux_losses else torch.zeros((), device=self.device)
        loss = cross_entropy = None
        if labels is not None:
            cross_entropy = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            loss = cross_entropy + aux_loss
        self.last_losses = LossParts(
            cross_entropy=None if cross_entropy is None else cross_entropy.detach(),
            aux_losses={kind: value.detach() for kind, value in aux_losses.items()},
        )
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, past_key_values=past_key_values)

    def _aux_losses(self, routings: Mapping[int, Routing]) -> dict[str, torch.Tensor]:
        """Returns kind -> auxiliary loss summed over all layers, times its coefficient."""
        losses: dict[str, list[torch.Tensor]] = {}
        any_gate = next(iter(self.gates().values()))  # all have the same type and options
        pooled = any_gate.pooled_losses([routing.pool for routing in routings.values()])
        for of_layer in (*(routing.aux_losses for routing in routings.values()), pooled):
            for kind, loss in of_layer.items():
                losses.setdefault(kind, []).append(loss)
        return {kind: torch.stack(of_layers).sum() for kind, of_layers in losses.items()}


def _without_gradient(routing: Routing) -> Routing:
    return Routing(
        ids_TK=routing.ids_TK,
        weights_TK=routing.weights_TK.detach(),
        aux_losses={name: loss.detach() for name, loss in routing.aux_losses.items()},
        pool={name: value.detach() for name, value in routing.pool.items()},
    )
