"""One expert of a family's experts module, as a module of its own. Imports nothing of transformers.

Activation, gating and layout come from the family. The shard owns the expert's rows without the expert dimension, so
that backward writes gradients of one expert's size and the graph has no select.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn

from moecluster.errors import UnsupportedModelError
from moecluster.moe.linear import can_pack, linear, pack

RowFunction = Callable[[torch.Tensor], torch.Tensor]


class ExpertShard(nn.Module):
    """E_i(x) of a family that uses transformers' experts interface, not multiplied by the gate weight.

    Its parameters have the names of the family's fused ones (`gate_up_proj` [2F, D] for `gate_up_proj` [E, 2F, D]).
    """

    def __init__(
        self,
        rows: Mapping[str, torch.Tensor],
        *,
        up_name: str,
        activate: RowFunction,
        is_transposed: bool = False,
        post_norm: RowFunction | None = None,
    ) -> None:
        """rows: the expert's slices of the family's parameters; not copied. up_name: the first projection.

        activate: the function between the two products, gating included. is_transposed: weights are [in, out].
        """
        super().__init__()
        for name, row in rows.items():
            self.register_parameter(name, nn.Parameter(row))
        self._up_name = up_name
        self._is_transposed = is_transposed
        self._activate = activate
        self._post_norm = post_norm

    @classmethod
    def of_family(cls, experts: nn.Module, rows: Mapping[str, torch.Tensor]) -> Self:
        """experts: the family's experts module, its parameters on any device or absent. rows: the expert's slices of
        them."""
        # Methods bound to a copy without parameters keep the family's weights out of the shard.
        family = _without_parameters(experts)
        return cls(
            rows,
            up_name=first_projection(experts),
            activate=family._apply_gate if family.has_gate else family.act_fn,
            is_transposed=bool(family.is_transposed),
            post_norm=family.post_expert_norm if family.has_post_expert_norm else None,
        )

    @classmethod
    def of_module(cls, experts: nn.Module, index: int) -> Self:
        """Returns expert `index` of an experts module that is in memory, with its rows copied."""
        rows = {name: value.detach()[index].clone() for name, value in experts.named_parameters(recurse=False)}
        return cls.of_family(experts, rows)

    def packable(self) -> list[tuple[nn.Module, str]]:
        """Returns the owner and name of every weight that this CPU has a packed form for; none if transposed."""
        return [(self, name) for name, value in self.named_parameters() if not self._is_transposed and can_pack(value)]

    def pack(self) -> None:
        """Packs the weights for serving."""
        for owner, name in self.packable():
            setattr(owner, name, pack(getattr(owner, name)))

    def forward(self, x_nD: torch.Tensor) -> torch.Tensor:
        """x_nD: rows in the parameters' dtype. Returns y_nD, not multiplied by the gate weight."""
        weights = self._parameters
        up, down = weights[self._up_name], weights["down_proj"]
        up_bias, down_bias = weights.get(f"{self._up_name}_bias"), weights.get("down_proj_bias")
        assert up is not None and down is not None
        h_nF = self._activate(linear(x_nD, up.t() if self._is_transposed else up, up_bias))
        y_nD = linear(h_nF, down.t() if self._is_transposed else down, down_bias)
        return y_nD if self._post_norm is None else self._post_norm(y_nD)


def first_projection(experts: nn.Module) -> str:
    """Returns the name of the first projection."""
    return "gate_up_proj" if experts.__dict__["has_gate"] else "up_proj"


def _without_parameters(experts: nn.Module) -> Any:
    """Returns a shallow copy that shares the family's activation but owns no weight."""
    family = copy.copy(experts)
    family._parameters = {}
    held = [name for name, _ in (*family.named_parameters(), *family.named_buffers())]
    if held:
        raise UnsupportedModelError(
            f"{type(experts).__name__} keeps {', '.join(held)} for all its experts together; "
            "an expert of it cannot stand by itself"
        )
    return family
