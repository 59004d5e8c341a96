"""Evaluates a model on validation text."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from moecluster.training.data import TextData


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Bits per byte: cross-entropy in bits per token, divided by bytes per token."""

    bits_per_byte: float  # mean over domains, which have the same number of tokens
    domains: dict[str, float]


@torch.no_grad()
def evaluate(model: PreTrainedModel, data: TextData, *, windows: int, batch_size: int) -> Evaluation:
    """Runs the model over validation windows, in evaluation mode. Its assignments do not count as training load."""
    was_training = model.training
    model.eval()
    try:
        domains = {}
        for domain in data.domains:
            windows_WS = data.validation_windows(math.ceil(windows / len(data.domains)), domain.name)
            nats = sum(_nats(model, part_BS) for part_BS in windows_WS.split(batch_size))
            predicted = windows_WS[:, 1:].numel()
            domains[domain.name] = nats / predicted / math.log(2) / domain.bytes_per_token
    finally:
        model.train(was_training)
    return Evaluation(bits_per_byte=sum(domains.values()) / len(domains), domains=domains)


def _nats(model: PreTrainedModel, ids_BS: torch.Tensor) -> float:
    """Returns the cross-entropy in nats, summed over all tokens but the first of each sequence."""
    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].float()
    return float(F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="sum"))
