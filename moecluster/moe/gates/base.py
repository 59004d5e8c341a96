"""The base class of gates: reproducible noise, expert capacity, and the losses that any gate can use.

A family's gate subclasses `Gate`; its `choose` picks each token's experts and their weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from moecluster.config.fields import Section, setting
from moecluster.errors import ConfigError
from moecluster.moe.gates.capacity import drop_beyond_capacity, expert_capacity
from moecluster.moe.gates.losses import entropy, z_loss


@dataclass(frozen=True, kw_only=True)
class GateOptions(Section):
    """Options of every gate. They have no effect unless set."""

    section: ClassVar[str] = "model.gate_options"

    jitter: float = setting(
        0.0, "In training, the gate's input is multiplied by U(1 - jitter, 1 + jitter). 0: none.", minimum=0
    )
    capacity_factor: float = setting(
        0.0, "Capacity of an expert in training, as a multiple of its even share. 0: no limit.", minimum=0
    )
    eval_capacity_factor: float = setting(
        0.0, "Capacity of an expert outside training, likewise. 0: no limit.", minimum=0
    )
    drop_policy: str = setting(
        "position", "Tokens that keep their expert at capacity: the first, or the most probable ones.",
        choices=("position", "probability"),
    )  # fmt: skip
    router_z_loss_coef: float = setting(0.0, "Coefficient of the router z-loss.", minimum=0)
    router_entropy_coef: float = setting(0.0, "Coefficient of the entropy of the routing probabilities.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens that a gate routes, without padding."""

    x_TD: torch.Tensor  # float32
    sequence_ids_T: torch.Tensor  # int64, the sequence of the batch that each token belongs to
    input_ids_T: torch.Tensor | None  # int64 token ids


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a gate decided for T tokens.

    ids_TK: int64 in [0, E); an index >= E means that the assignment is skipped (dropped).
    weights_TK: float, multiplies the expert's output.
    aux_losses: name -> scalar tensor, already multiplied by its coefficient.
    pool: name -> tensor with gradient, for losses that the gate takes over all layers together.
    """

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    aux_losses: Mapping[str, torch.Tensor] = field(default_factory=dict)
    pool: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The result of `choose`, before capacity and the common losses."""

    ids_TK: torch.Tensor  # int64 in [0, E]; E: skip
    weights_TK: torch.Tensor  # float32
    logits_TE: torch.Tensor  # float32
    probs_TE: torch.Tensor  # float32, sum to 1 over E
    aux_losses: dict[str, torch.Tensor] = field(default_factory=dict)  # with their coefficients
    pool: dict[str, torch.Tensor] = field(default_factory=dict)  # becomes Routing.pool


class Gate(nn.Module):
    """Routes tokens to experts. Computes in float32 whatever the model's dtype.

    weight: float32 [E, D].
    """

    options_type: ClassVar[type[GateOptions]] = GateOptions
    zero_init: ClassVar[bool] = False  # whether the family starts from zero weights

    def __init__(self, *, hidden_size: int, num_experts: int, top_k: int, options: GateOptions) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"model.top_k: got {top_k}, expected at least 1 and at most num_experts = {num_experts}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.options = options
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self._noise_seed: int | None = None
        self._micro_batch = 0

    def begin_micro_batch(self, *, seed: int, step: int, micro_batch: int, layer: int) -> None:
        """Seeds all noise from these numbers, so that a repeated step draws the same.

        Without this call, noise comes from torch's global generator.
        """
        self._noise_seed = int(np.random.SeedSequence((seed, step, micro_batch, layer)).generate_state(1)[0])
        self._micro_batch = micro_batch

    def after_step(self, loads_E: torch.Tensor) -> None:
        """Adapts to the assignments [E] of a committed step, in gates that balance without a loss."""

    def forward(
        self,
        x_TD: torch.Tensor,
        *,
        input_ids_T: torch.Tensor | None = None,
        sequence_ids_T: torch.Tensor | None = None,
        valid_T: torch.Tensor | None = None,
    ) -> Routing:
        """Routes T tokens.

        x_TD: any floating dtype. input_ids_T: token ids, for gates that use them. sequence_ids_T: the sequence that
        each token belongs to; None: all tokens are of one sequence. valid_T: bool; tokens where it is False (padding)
        go to no expert, use no capacity and count in no loss.
        """
        if sequence_ids_T is None:
            sequence_ids_T = torch.zeros(x_TD.shape[0], dtype=torch.int64, device=x_TD.device)
        if valid_T is None or bool(valid_T.all()):
            return self._route(Tokens(x_TD=x_TD.float(), sequence_ids_T=sequence_ids_T, input_ids_T=input_ids_T))
        routing = self._route(
            Tokens(
                x_TD=x_TD[valid_T].float(),
                sequence_ids_T=sequence_ids_T[valid_T],
                input_ids_T=None if input_ids_T is None else input_ids_T[valid_T],
            )
        )
        shape = (x_TD.shape[0], routing.ids_TK.shape[1])
        ids_TK = torch.full(shape, self.num_experts, dtype=torch.int64, device=x_TD.device)
        ids_TK[valid_T] = routing.ids_TK
        weights_TK = routing.weights_TK.new_zeros(shape).masked_scatter(valid_T[:, None], routing.weights_TK)
        return Routing(
            ids_TK=ids_TK,
            weights_TK=weights_TK,
            aux_losses=routing.aux_losses,
            pool=routing.pool,
        )

    def choose(self, tokens: Tokens) -> Choice:
        """Chooses experts and weights. Jitter is already applied to `tokens.x_TD`; T is at least 1."""
        raise NotImplementedError

    def pooled_losses(self, pools: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Returns the losses over all layers together, from each layer's `Routing.pool`, with their coefficients."""
        return {}

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, {self.options}"

    def logits(self, tokens: Tokens) -> torch.Tensor:
        """Returns x Wᵀ, float32 [T, E]."""
        return nn.functional.linear(tokens.x_TD, self.weight.float())

    def uniform(self, shape: torch.Size, stream: int) -> torch.Tensor:
        """Returns float32 noise from [0, 1), drawn on the CPU so that it is the same on every device."""
        return torch.rand(shape, generator=self._generator(stream), dtype=torch.float32).to(self.weight.device)

    def normal(self, shape: torch.Size, stream: int) -> torch.Tensor:
        """Returns float32 noise from N(0, 1), drawn on the CPU so that it is the same on every device."""
        return torch.randn(shape, generator=self._generator(stream), dtype=torch.float32).to(self.weight.device)

    def _generator(self, stream: int) -> torch.Generator | None:
        """Each use of noise within a forward call has its own stream, so that none repeats another."""
        if self._noise_seed is None:
            return None
        return torch.Generator().manual_seed((self._noise_seed << 8) + stream)

    def _route(self, tokens: Tokens) -> Routing:
        num_tokens = tokens.x_TD.shape[0]
        if num_tokens == 0:
            ids_TK = torch.empty((0, self.top_k), dtype=torch.int64, device=tokens.x_TD.device)
            return Routing(ids_TK=ids_TK, weights_TK=tokens.x_TD.new_empty((0, self.top_k)))
        choice = self.choose(self._jittered(tokens))
        ids_TK = self._within_capacity(choice)
        dropped = ids_TK >= self.num_experts
        return Routing(
            ids_TK=ids_TK,
            weights_TK=choice.weights_TK.masked_fill(dropped, 0.0),
            aux_losses={**choice.aux_losses, **self._common_losses(choice)},
            pool=choice.pool,
        )

    def _jittered(self, tokens: Tokens) -> Tokens:
        jitter = self.options.jitter
        if not self.training or jitter == 0:
            return tokens
        factor_TD = 1 - jitter + 2 * jitter * self.uniform(tokens.x_TD.shape, stream=0)
        return Tokens(
            x_TD=tokens.x_TD * factor_TD, sequence_ids_T=tokens.sequence_ids_T, input_ids_T=tokens.input_ids_T
        )

    def _within_capacity(self, choice: Choice) -> torch.Tensor:
        factor = self.options.capacity_factor if self.training else self.options.eval_capacity_factor
        if factor == 0:
            return choice.ids_TK
        num_tokens, top_k = choice.ids_TK.shape
        capacity = expert_capacity(num_tokens, top_k=top_k, num_experts=self.num_experts, capacity_factor=factor)
        priority_T = choice.probs_TE.amax(dim=-1) if self.options.drop_policy == "probability" else None
        return drop_beyond_capacity(choice.ids_TK, capacity, self.num_experts, priority_T=priority_T)

    def _common_losses(self, choice: Choice) -> dict[str, torch.Tensor]:
        losses = {}
        if self.options.router_z_loss_coef > 0:
            losses["router_z"] = self.options.router_z_loss_coef * z_loss(choice.logits_TE)
        if self.options.router_entropy_coef > 0:
            losses["router_entropy"] = self.options.router_entropy_coef * entropy(choice.probs_TE)
        return losses
