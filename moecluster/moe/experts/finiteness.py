"""Checks whether experts return finite numbers."""

import math

import torch


def is_finite(y_TD: torch.Tensor) -> bool:
    """Whether all values are finite, by one reduction.

    A sum that overflows float32 also gives False, so the caller must check again in that case.
    """
    return math.isfinite(float(y_TD.sum(dtype=torch.float32)))


def probe_rows(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns fixed x_ND of moderate magnitude, for which a sound expert returns finite numbers."""
    x_D = torch.cos(torch.arange(width, dtype=torch.float32))
    return torch.stack([x_D, -x_D, x_D.flip(0) / 4]).to(dtype)
