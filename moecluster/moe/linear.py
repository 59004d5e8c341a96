"""The linear layer of experts, with plain weights or weights packed for this CPU.

With few rows, oneDNN is about twice as fast if the weight is in its own blocked layout (inductor's freezing does the
same). A packed weight replaces the plain one and takes as many bytes, gives bit for bit the same rows in bfloat16, and
unpacks to exactly the same values. It has no backward, so experts in training stay plain.
"""

import torch
from torch import nn
from torch.nn import functional as F

PACKABLE = (torch.float32, torch.bfloat16)


def linear(x_nI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Returns x W^T + b."""
    if weight_OI.is_mkldnn:
        packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_nI, weight_OI, bias_O, "none", [], "")
        return packed
    return F.linear(x_nI, weight_OI, bias_O)


class RowLinear(nn.Linear):
    """nn.Linear whose weight may be packed."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def can_pack(weight_OI: torch.Tensor) -> bool:
    """Whether this CPU has a packed form for the weight."""
    if weight_OI.is_mkldnn or weight_OI.device.type != "cpu" or weight_OI.dim() != 2 or weight_OI.dtype not in PACKABLE:
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return weight_OI.dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight_OI: torch.Tensor) -> nn.Parameter:
    """Returns the packed form of a weight for which can_pack is True."""
    return nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach()), requires_grad=False)


def plain(value: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a parameter in the plain layout."""
    value = value.detach()
    return value.to_dense() if value.is_mkldnn else value.clone()
