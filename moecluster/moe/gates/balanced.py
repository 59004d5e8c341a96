"""Gates with the load balance loss α E Σ f_i P_i, in the variants that systems use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moecluster.config.fields import setting
from moecluster.moe.gates.base import Choice, Gate, GateOptions
from moecluster.moe.gates.capacity import count_assignments
from moecluster.moe.gates.losses import load_balance_loss


@dataclass(frozen=True, kw_only=True)
class BalancedOptions(GateOptions):
    """Options of gates with the load balance loss."""

    router_aux_loss_coef: float = setting(0.0, "α, the coefficient of the load balance loss.", minimum=0)
    pool_layers: bool = setting(False, "Average f and P over all layers before the product, as transformers does.")
    load_scope: str = setting(
        "micro_batch",
        "What f counts in training: the micro-batch, or all micro-batches of the step so far.",
        choices=("micro_batch", "global_batch"),
    )


class BalancedGate(Gate):
    """A gate with the load balance loss, per layer or over all layers at once."""

    options_type: ClassVar[type[GateOptions]] = BalancedOptions
    options: BalancedOptions

    def __init__(self, *, hidden_size: int, num_experts: int, top_k: int, options: BalancedOptions) -> None:
        super().__init__(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k, options=options)
        self._step_loads: dict[int, tuple[torch.Tensor, int]] = {}  # micro-batch -> (assignments [E], tokens)

    def begin_micro_batch(self, *, seed: int, step: int, micro_batch: int, layer: int) -> None:
        super().begin_micro_batch(seed=seed, step=step, micro_batch=micro_batch, layer=layer)
        # A repeated micro-batch replaces its own counts.
        self._step_loads = {earlier: load for earlier, load in self._step_loads.items() if earlier < micro_batch}

    def balanced(
        self, *, ids_TK: torch.Tensor, weights_TK: torch.Tensor, logits_TE: torch.Tensor, probs_TE: torch.Tensor
    ) -> Choice:
        """Returns a choice with this layer's loss, or, with pool_layers, with the terms of the loss over all layers."""
        terms = {"load_fraction_E": self._load_fraction(ids_TK), "mean_probs_E": probs_TE.mean(dim=0)}
        return Choice(
            ids_TK=ids_TK,
            weights_TK=weights_TK,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            aux_losses={} if self.options.pool_layers else self._loss(terms),
            pool=terms if self.options.pool_layers else {},
        )

    def pooled_losses(self, pools: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Returns the loss over all layers together. Layers without tokens are left out."""
        layers = [pool for pool in pools if pool]
        if not layers:
            return {}
        return self._loss({name: torch.stack([pool[name] for pool in layers]).mean(dim=0) for name in layers[0]})

    def _loss(self, terms: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        loss = load_balance_loss(terms["load_fraction_E"], terms["mean_probs_E"])
        return {"load_balance": self.options.router_aux_loss_coef * loss}

    def _load_fraction(self, ids_TK: torch.Tensor) -> torch.Tensor:
        counts_E, num_tokens = count_assignments(ids_TK, self.num_experts), ids_TK.shape[0]
        if self.training and self.options.load_scope == "global_batch":
            self._step_loads[self._micro_batch] = (counts_E, num_tokens)
            counts_E = torch.stack([counts_E for counts_E, _ in self._step_loads.values()]).sum(dim=0)
            num_tokens = sum(num_tokens for _, num_tokens in self._step_loads.values())
        return counts_E.float() / num_tokens
