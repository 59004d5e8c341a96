"""The feed-forward network of Transformers: up, activation, down."""

import torch

from moecluster.moe.experts.base import Expert
from moecluster.moe.linear import RowLinear


class FfnExpert(Expert):
    """y = W_down act(W_up x), without biases. up_proj.weight [F, D], down_proj.weight [D, F]."""

    def __init__(self, *, hidden_size: int, inner_size: int, activation: str) -> None:
        super().__init__(hidden_size=hidden_size, inner_size=inner_size, activation=activation)
        self.up_proj = RowLinear(hidden_size, inner_size, bias=False)
        self.down_proj = RowLinear(inner_size, hidden_size, bias=False)

    def forward(self, x_nD: torch.Tensor) -> torch.Tensor:
        y_nD: torch.Tensor = self.down_proj(self.activate(self.up_proj(x_nD)))
        return y_nD
