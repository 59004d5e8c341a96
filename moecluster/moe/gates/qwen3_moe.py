"""Softmax, then top-k of the probabilities, renormalized (Qwen3 technical report, 2025).

The load in its loss is counted over the global batch (Demons in the Detail, Qiu et al. 2025).
"""

from dataclasses import dataclass
from typing import ClassVar

from moecluster.config.fields import setting
from moecluster.moe.gates.balanced import BalancedGate, BalancedOptions
from moecluster.moe.gates.base import Choice, GateOptions, Tokens


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeOptions(BalancedOptions):
    """Options of the `qwen3-moe` gate."""

    norm_topk_prob: bool = setting(True, "Divide the chosen probabilities by their sum.")
    router_aux_loss_coef: float = setting(1e-3, "α, the coefficient of the load balance loss.", minimum=0)
    pool_layers: bool = setting(True, "Average f and P over all layers before the product, as transformers does.")
    load_scope: str = setting(
        "global_batch",
        "What f counts in training: the micro-batch, or all micro-batches of the step so far.",
        choices=("micro_batch", "global_batch"),
    )


class Qwen3MoeGate(BalancedGate):
    """Weights: the k best probabilities, by default divided by their sum. Loss: α E Σ f_i P_i."""

    options_type: ClassVar[type[GateOptions]] = Qwen3MoeOptions
    options: Qwen3MoeOptions

    def choose(self, tokens: Tokens) -> Choice:
        logits_TE = self.logits(tokens)
        probs_TE = logits_TE.softmax(dim=-1)
        best = probs_TE.topk(self.top_k, dim=-1)
        weights_TK = best.values
        if self.options.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return self.balanced(ids_TK=best.indices, weights_TK=weights_TK, logits_TE=logits_TE, probs_TE=probs_TE)
