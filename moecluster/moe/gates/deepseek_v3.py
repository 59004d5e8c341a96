"""Sigmoid affinities, groups of experts, and a bias instead of a loss (DeepSeek-V3 technical report, 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from moecluster.config.fields import setting
from moecluster.errors import ConfigError
from moecluster.moe.gates.base import Choice, Gate, GateOptions, Tokens
from moecluster.moe.gates.losses import sequence_balance_loss


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Options(GateOptions):
    """Options of the `deepseek-v3` gate."""

    n_group: int = setting(8, "Groups that the experts are divided into.", minimum=1)
    topk_group: int = setting(4, "Groups that a token may choose experts from.", minimum=1)
    norm_topk_prob: bool = setting(True, "Divide the chosen affinities by their sum.")
    routed_scaling_factor: float = setting(2.5, "Factor of all routing weights.", above=0)
    bias_update_speed: float = setting(1e-3, "γ, the change of the bias after each step.", minimum=0)
    sequence_aux_loss_coef: float = setting(1e-4, "Coefficient of the balance loss within sequences.", minimum=0)


class DeepseekV3Gate(Gate):
    """s = sigmoid(x Wᵀ). Experts are chosen by s + b; their weights are computed from s.

    A group's score is the sum of its two best s + b. A token chooses its experts from the `topk_group` best groups.
    Weights: s / Σ s of the chosen, times `routed_scaling_factor`. Loss: within each sequence, on s alone.
    e_score_correction_bias: float32 buffer [E], the b that `after_step` updates.
    """

    options_type: ClassVar[type[GateOptions]] = DeepseekV3Options
    options: DeepseekV3Options
    e_score_correction_bias: torch.Tensor

    def __init__(self, *, hidden_size: int, num_experts: int, top_k: int, options: DeepseekV3Options) -> None:
        super().__init__(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k, options=options)
        groups, kept = options.n_group, options.topk_group
        if num_experts % groups or num_experts // groups < 2:
            raise options.complain("n_group", f"expected groups of equal size, at least 2, of {num_experts} experts")
        if kept > groups:
            raise options.complain("topk_group", f"expected at most n_group = {groups}")
        if top_k > num_experts // groups * kept:
            raise ConfigError(
                f"model.top_k: got {top_k}, expected at most the {num_experts // groups * kept} experts of "
                f"topk_group = {kept} groups"
            )
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def choose(self, tokens: Tokens) -> Choice:
        logits_TE = self.logits(tokens)
        scores_TE = logits_TE.sigmoid()
        ids_TK = self._select(scores_TE.detach() + self.e_score_correction_bias.float())
        weights_TK = scores_TE.gather(1, ids_TK)
        if self.options.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        probs_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)  # all may underflow to 0
        # The report's equation 18 counts the k best of s, not of s + b.
        balance = sequence_balance_loss(scores_TE.topk(self.top_k, dim=-1).indices, probs_TE, tokens.sequence_ids_T)
        return Choice(
            ids_TK=ids_TK,
            weights_TK=weights_TK * self.options.routed_scaling_factor,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            aux_losses={"sequence_balance": self.options.sequence_aux_loss_coef * balance},
        )

    @torch.no_grad()
    def after_step(self, loads_E: torch.Tensor) -> None:
        """Applies b += γ sign(mean load - load): an overloaded expert becomes less likely."""
        loads_E = loads_E.to(self.e_score_correction_bias)
        self.e_score_correction_bias += self.options.bias_update_speed * torch.sign(loads_E.mean() - loads_E)

    def _select(self, biased_TE: torch.Tensor) -> torch.Tensor:
        """Returns int64 [T, K]: the best experts of the best groups."""
        num_tokens, groups = biased_TE.shape[0], self.options.n_group
        biased_TGE = biased_TE.view(num_tokens, groups, -1)
        group_scores_TG = biased_TGE.topk(2, dim=-1).values.sum(dim=-1)
        best_groups = group_scores_TG.topk(self.options.topk_group, dim=-1).indices
        kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter(1, best_groups, True)
        allowed_TE = biased_TGE.masked_fill(~kept_TG[:, :, None], float("-inf")).flatten(1)
        return allowed_TE.topk(self.top_k, dim=-1).indices
