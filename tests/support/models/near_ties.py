"""When two greedy outputs may differ: only from a step on at which the two best logits nearly tie."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

NEAR_TIE = 1e-4  # float32


@torch.no_grad()
def is_near_tie(model: PreTrainedModel, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether two outputs first differ at a step at which the whole model's two best logits nearly tie."""
    step = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if step is None:
        return False  # one merely ends earlier
    logits_V = model(torch.tensor([[*prompt, *theirs[:step]]])).logits[0, -1]
    best = logits_V.topk(2)
    return {ours[step], theirs[step]} == set(best.indices.tolist()) and float(best.values.diff().abs()) < NEAR_TIE
