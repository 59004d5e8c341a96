"""Whether experts answer with finite numbers."""

import math

import torch


def is_finite(y_TD: torch.Tensor) -> bool:
    """Whether all is finite: one reduction. Sums beyond float32 count as not finite, so that False is to be checked."""
    return math.isfinite(float(y_TD.sum(dtype=torch.float32)))


def probe_rows(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """x_ND, always the same: rows of moderate size that a sound expert answers with finite numbers."""
    x_D = torch.cos(torch.arange(width, dtype=torch.float32))
    return torch.stack([x_D, -x_D, x_D.flip(0) / 4]).to(dtype)
