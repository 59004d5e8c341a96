"""Noisy top-k gating (Outrageously Large Neural Networks, Shazeer et al. 2017)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from moecluster.config.fields import setting
from moecluster.moe.gates.base import Choice, Gate, GateOptions, Tokens
from moecluster.moe.gates.capacity import count_assignments
from moecluster.moe.gates.losses import cv_squared, smooth_load


@dataclass(frozen=True, kw_only=True)
class SparselyGatedOptions(GateOptions):
    """Options of the `sparsely-gated` gate."""

    w_importance: float = setting(0.1, "Coefficient of the importance loss.", minimum=0)
    w_load: float = setting(0.1, "Coefficient of the load loss.", minimum=0)


class SparselyGatedGate(Gate):
    """H = x Wg + N(0, 1) softplus(x Wn) while training; top-k of H; softmax over these.

    Losses: w_importance CV²(Σ weights) + w_load CV²(Load), where Load is an expert's expected number of tokens over the
    noise. Outside training there is no noise, and Load is the plain count.
    noise_weight: float32 [E, D], Wn.
    """

    options_type: ClassVar[type[GateOptions]] = SparselyGatedOptions
    zero_init: ClassVar[bool] = True
    options: SparselyGatedOptions

    def __init__(self, *, hidden_size: int, num_experts: int, top_k: int, options: SparselyGatedOptions) -> None:
        super().__init__(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k, options=options)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def choose(self, tokens: Tokens) -> Choice:
        clean_TE = self.logits(tokens)
        std_TE = nn.functional.softplus(nn.functional.linear(tokens.x_TD, self.noise_weight.float()))
        noisy_TE = clean_TE + self.normal(clean_TE.shape, stream=1) * std_TE if self.training else clean_TE
        best = noisy_TE.topk(self.top_k, dim=-1)
        weights_TK = best.values.softmax(dim=-1)
        importance_E = torch.zeros_like(clean_TE).scatter(1, best.indices, weights_TK).sum(dim=0)
        if self.training:
            load_E = smooth_load(clean_TE, noisy_TE, std_TE, self.top_k)
        else:
            load_E = count_assignments(best.indices, self.num_experts).float()
        return Choice(
            ids_TK=best.indices,
            weights_TK=weights_TK,
            logits_TE=noisy_TE,
            probs_TE=noisy_TE.softmax(dim=-1),
            aux_losses={
                "importance": self.options.w_importance * cv_squared(importance_E),
                "load": self.options.w_load * cv_squared(load_E),
            },
        )
