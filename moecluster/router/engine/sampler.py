"""Samples the next token of each sequence in a batch from the model's logits.

Sampling is keyed by seed and position: the same request draws the same tokens on any router, in any batch, even if
another router continues the sequence. This takes one uniform number per token, mapped through the cumulative
probabilities.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moecluster.errors import MoeClusterError, RequestFailed
from moecluster.generation import SamplingParameters
from moecluster.router.engine.batch_errors import sequence_error

# Below this temperature any difference of two logits decides, as for 0; dividing by it stays finite.
GREEDY_BELOW = 1e-6
MOST_LIKELY = 1024  # tokens searched for the nucleus before all are sorted


@dataclass(frozen=True, kw_only=True)
class SampledToken:
    """A token, and log-probabilities if requested."""

    id: int
    logprob: float | None = None  # of the model, before sampling parameters
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens and their log-probabilities, best first


class SampledSequence(Protocol):
    """What the sampler reads of a sequence."""

    name: str
    sampling: SamplingParameters
    wants_logprobs: bool
    top_logprobs: int
    generated_counts: Counter[int]

    @property
    def prompt_ids(self) -> Sequence[int]: ...

    @property
    def generated_ids(self) -> Sequence[int]: ...


def sample_tokens(
    sequences: Sequence[SampledSequence], logits_BV: torch.Tensor
) -> list[SampledToken | MoeClusterError]:
    """Returns a token for each sequence, or its error: an error affects only its own sequence.

    logits_BV: float32, one row per sequence; not modified.
    """
    highest_B, best_B = logits_BV.max(dim=-1)
    rows = zip(sequences, logits_BV, highest_B.tolist(), best_B.tolist(), strict=True)
    return [_sample_one(sequence, logits_V, highest, best) for sequence, logits_V, highest, best in rows]


def _sample_one(
    sequence: SampledSequence, logits_V: torch.Tensor, highest: float, best: int
) -> SampledToken | MoeClusterError:
    try:
        if not math.isfinite(highest):  # NaN if the row holds NaN
            raise RequestFailed("the model's logits are NaN or infinite")
        token = best if _takes_argmax(sequence.sampling) else _choose(sequence, logits_V)
        return _with_logprobs(sequence, logits_V, token) if sequence.wants_logprobs else SampledToken(id=token)
    except Exception as exc:
        return sequence_error(sequence.name, exc, "choosing its next token")


def _takes_argmax(sampling: SamplingParameters) -> bool:
    return _is_greedy(sampling) and not _changes_logits(sampling)


def _is_greedy(sampling: SamplingParameters) -> bool:
    return sampling.temperature < GREEDY_BELOW


def _changes_logits(sampling: SamplingParameters) -> bool:
    return bool(
        sampling.repetition_penalty not in (0.0, 1.0)
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.logit_bias
    )


def _choose(sequence: SampledSequence, logits_V: torch.Tensor) -> int:
    sampling = sequence.sampling
    if _changes_logits(sampling):
        logits_V = with_penalties(sequence, logits_V)
    if _is_greedy(sampling):
        return int(logits_V.argmax())
    position = len(sequence.prompt_ids) + len(sequence.generated_ids)
    return draw(logits_V, sampling, keyed_uniform(sampling.seed, position))


def with_penalties(sequence: SampledSequence, logits_V: torch.Tensor) -> torch.Tensor:
    """The logits after penalties and biases, as a copy in float64, in which no accepted penalty overflows.

    repetition_penalty counts prompt and generated tokens (Keskar et al., CTRL, 2019); presence and frequency count
    generated tokens only, as in OpenAI's API: logit - presence - frequency x count.
    """
    sampling, logits_V = sequence.sampling, logits_V.double().clone()
    if sampling.repetition_penalty not in (0.0, 1.0):
        seen = torch.tensor(sorted({*sequence.prompt_ids, *sequence.generated_ids}), device=logits_V.device)
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if sequence.generated_counts and (sampling.presence_penalty or sampling.frequency_penalty):
        generated = torch.tensor(list(sequence.generated_counts), device=logits_V.device)
        counts = torch.tensor(list(sequence.generated_counts.values()), device=logits_V.device, dtype=logits_V.dtype)
        logits_V[generated] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    for token, bias in sampling.logit_bias.items():
        logits_V[token] += bias
    return logits_V


def draw(logits_V: torch.Tensor, sampling: SamplingParameters, uniform: float) -> int:
    """Draws a token from softmax(logits / temperature), filtered by top_k, then top_p, then min_p.

    The highest logit must be finite, and the temperature at least GREEDY_BELOW.
    """
    scaled_V = (logits_V - logits_V.max()) / sampling.temperature
    if sampling.top_k or 0 < sampling.top_p < 1 or sampling.min_p:
        ids, probabilities = _likely(torch.softmax(scaled_V, dim=-1), sampling)
        return int(ids[_position(probabilities, uniform)])
    return _position(torch.softmax(scaled_V, dim=-1), uniform)


def _likely(probabilities_V: torch.Tensor, sampling: SamplingParameters) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (ids, probabilities) that top_k, top_p and min_p keep, most likely first; they need not sum to 1."""
    size = len(probabilities_V)
    wanted = min(sampling.top_k or size, size)
    values, ids = torch.topk(probabilities_V, min(wanted, MOST_LIKELY))
    # top_p is a fraction of the mass that top_k keeps.
    mass = 1.0 if wanted == size else float(torch.topk(probabilities_V, wanted).values.sum())
    unseen = len(values) < wanted
    if unseen and (not 0 < sampling.top_p < 1 or float(values.sum()) < sampling.top_p * mass):
        values, ids = torch.topk(probabilities_V, wanted)
    if 0 < sampling.top_p < 1:
        before = torch.cumsum(values, dim=0) - values
        values = values[: max(int((before < sampling.top_p * mass).sum()), 1)]
    if sampling.min_p:
        values = values[: max(int((values >= sampling.min_p * values[0]).sum()), 1)]
    return ids[: len(values)], values


def _position(weights: torch.Tensor, uniform: float) -> int:
    """Where a uniform number in [0, 1) falls on the cumulative weights; never on a weight of 0."""
    cumulative = torch.cumsum(weights.double(), dim=0)
    at = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    return min(at, int(weights.nonzero()[-1]))


def keyed_uniform(seed: int, position: int) -> float:
    """Returns a number in [0, 1) that depends only on seed and position."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _with_logprobs(sequence: SampledSequence, logits_V: torch.Tensor, token: int) -> SampledToken:
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if sequence.top_logprobs:
        values, ids = torch.topk(logprobs_V, min(sequence.top_logprobs, len(logprobs_V)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return SampledToken(id=token, logprob=float(logprobs_V[token]), top=top)
