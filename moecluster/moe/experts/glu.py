"""Gated linear units (GLU Variants Improve Transformer, Shazeer 2020): SwiGLU with silu, GEGLU with gelu."""

import torch

from moecluster.moe.experts.base import Expert
from moecluster.moe.linear import RowLinear


class GluExpert(Expert):
    """y = W_down (act(W_gate x) * W_up x), without biases.

    gate_up_proj.weight [2F, D], the gate's rows first; down_proj.weight [D, F].
    """

    def __init__(self, *, hidden_size: int, inner_size: int, activation: str) -> None:
        super().__init__(hidden_size=hidden_size, inner_size=inner_size, activation=activation)
        self.gate_up_proj = RowLinear(hidden_size, 2 * inner_size, bias=False)
        self.down_proj = RowLinear(inner_size, hidden_size, bias=False)

    def forward(self, x_nD: torch.Tensor) -> torch.Tensor:
        gate_nF, up_nF = self.gate_up_proj(x_nD).chunk(2, dim=-1)
        y_nD: torch.Tensor = self.down_proj(self.activate(gate_nF) * up_nF)
        return y_nD
