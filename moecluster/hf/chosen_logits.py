"""Turns tokens that are already sampled into logits that make transformers' greedy search pick them."""

from collections.abc import Iterable

import torch

CHOSEN = 1.0  # the logit of the chosen token; all others are 0


def chosen_logits(scores_BV: torch.Tensor, chosen: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Returns logits of the shape of scores_BV whose best token is the given one in each (row, token). Other rows are
    all 0."""
    only_BV = torch.zeros_like(scores_BV)
    for row, token in chosen:
        only_BV[row, token] = CHOSEN
    return only_BV
