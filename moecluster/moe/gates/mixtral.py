"""Top-k of the logits, softmax over these (Mixtral of Experts, 2024)."""

from dataclasses import dataclass
from typing import ClassVar

from moecluster.config.fields import setting
from moecluster.moe.gates.balanced import BalancedGate, BalancedOptions
from moecluster.moe.gates.base import Choice, GateOptions, Tokens


@dataclass(frozen=True, kw_only=True)
class MixtralOptions(BalancedOptions):
    """Options of the `mixtral` gate."""

    router_aux_loss_coef: float = setting(
        0.02, "α, the coefficient of the load balance loss; 0.02 as released.", minimum=0
    )
    pool_layers: bool = setting(True, "Average f and P over all layers before the product, as transformers does.")


class MixtralGate(BalancedGate):
    """Weights: softmax over the k best logits. Loss: α E Σ f_i P_i."""

    options_type: ClassVar[type[GateOptions]] = MixtralOptions

    def choose(self, tokens: Tokens) -> Choice:
        logits_TE = self.logits(tokens)
        best = logits_TE.topk(self.top_k, dim=-1)
        return self.balanced(
            ids_TK=best.indices,
            weights_TK=best.values.softmax(dim=-1),
            logits_TE=logits_TE,
            probs_TE=logits_TE.softmax(dim=-1),
        )
