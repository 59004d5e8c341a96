"""A choice of tokens that was made already, as logits: transformers' greedy search then takes it."""

from collections.abc import Iterable

import torch

CHOSEN = 1.0  # the logit of the chosen token, where all others are 0


def chosen_logits(scores_BV: torch.Tensor, chosen: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Logits like these, whose best token is that of each (row, token). Of other rows nothing is said."""
    only_BV = torch.zeros_like(scores_BV)
    for row, token in chosen:
        only_BV[row, token] = CHOSEN
    return only_BV
