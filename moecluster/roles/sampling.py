"""Sampling keyed by seed and position: the same request draws the same tokens on any router, in any company.

Gumbel-max (Gumbel 1954; Maddison, Tarlow, Minka: A* Sampling, 2014): argmax of log p + Gumbel noise is a draw from p.
So generation stays greedy, and the noise of a position comes from a generator of its own instead of a shared one.
"""

import hashlib

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moecluster.generations import SamplingParameters


class KeyedSampler(LogitsProcessor):
    """Adds the request's noise to the logits of each step, after temperature, top_k and top_p."""

    def __init__(self, sampling: SamplingParameters) -> None:
        assert sampling.temperature > 0
        self._seed = sampling.seed
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(top_k=sampling.top_k))
        if 0 < sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p=sampling.top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """scores: float [1, vocabulary]."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        noise = gumbel_noise(self._seed, position=input_ids.shape[1], size=scores.shape[1])
        noisy: torch.FloatTensor = scores + noise.to(scores)  # type: ignore[assignment]
        return noisy


def gumbel_noise(seed: int, *, position: int, size: int) -> torch.Tensor:
    """float64 [size] on the CPU, the same for equal arguments."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return -torch.log(-torch.log(uniform))
