"""The base class of experts, which map rows to rows of the same width."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from moecluster.config.fields import suggest
from moecluster.errors import ConfigError
from moecluster.moe.linear import RowLinear, can_pack, pack

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: Mapping[str, Activation] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


class Expert(nn.Module):
    """One expert E_i. Its output is not multiplied by the gate weight.

    forward: x_nD -> y_nD, of the same dtype; n may be 0. Each output row depends only on its input row.
    """

    def __init__(self, *, hidden_size: int, inner_size: int, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f'model.activation: got "{activation}", no such activation; {suggest(activation, ACTIVATIONS)}'
            )
        self.hidden_size = hidden_size
        self.inner_size = inner_size
        self.activation = activation

    def forward(self, x_nD: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def activate(self, x_nF: torch.Tensor) -> torch.Tensor:
        return ACTIVATIONS[self.activation](x_nF)

    def packable(self) -> list[tuple[nn.Module, str]]:
        """Returns the owner and name of every weight that this CPU has a packed form for."""
        layers = [layer for layer in self.children() if isinstance(layer, RowLinear)]
        return [(layer, "weight") for layer in layers if can_pack(layer.weight)]

    def pack(self) -> None:
        """Packs the weights for serving."""
        for owner, name in self.packable():
            setattr(owner, name, pack(getattr(owner, name)))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
