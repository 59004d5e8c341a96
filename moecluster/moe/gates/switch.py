"""One expert per token, limited capacity (Switch Transformers, Fedus, Zoph and Shazeer 2021)."""

from dataclasses import dataclass
from typing import ClassVar

from moecluster.config.fields import setting
from moecluster.errors import ConfigError
from moecluster.moe.gates.balanced import BalancedGate, BalancedOptions
from moecluster.moe.gates.base import Choice, GateOptions, Tokens


@dataclass(frozen=True, kw_only=True)
class SwitchOptions(BalancedOptions):
    """Options of the `switch` gate.

    By default no token is dropped outside training, so that a sequence does not depend on the others in its batch.
    """

    jitter: float = setting(
        1e-2, "In training, the gate's input is multiplied by U(1 - jitter, 1 + jitter). 0: none.", minimum=0
    )
    capacity_factor: float = setting(
        1.25, "Capacity of an expert in training, as a multiple of its even share. 0: no limit.", minimum=0
    )
    router_aux_loss_coef: float = setting(1e-2, "α, the coefficient of the load balance loss.", minimum=0)


class SwitchGate(BalancedGate):
    """Weight: the best probability. Loss: α E Σ f_i P_i, with f counted before tokens are dropped."""

    options_type: ClassVar[type[GateOptions]] = SwitchOptions

    def __init__(self, *, hidden_size: int, num_experts: int, top_k: int, options: SwitchOptions) -> None:
        if top_k != 1:
            raise ConfigError(f"model.top_k: got {top_k}, the switch gate sends a token to 1 expert")
        super().__init__(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k, options=options)

    def choose(self, tokens: Tokens) -> Choice:
        logits_TE = self.logits(tokens)
        probs_TE = logits_TE.softmax(dim=-1)
        best = probs_TE.max(dim=-1, keepdim=True)
        return self.balanced(ids_TK=best.indices, weights_TK=best.values, logits_TE=logits_TE, probs_TE=probs_TE)
