"""The next token of each text in a batch, out of the model's logits.

Sampling is keyed by seed and position: the same request draws the same tokens on any router, in any company, also when
a text goes on at another router. One uniform number a token, laid on the cumulative probabilities, is enough for that.
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
from moecluster.router.engine.batch_errors import text_error

# Below it two logits that differ at all are told apart as by 0, and dividing by it stays finite.
GREEDY_BELOW = 1e-6
MOST_LIKELY = 1024  # tokens that a nucleus is looked for in, before all are sorted


@dataclass(frozen=True, kw_only=True)
class ChosenToken:
    """A token, and log-probabilities if they were asked for."""

    id: int
    logprob: float | None = None  # of the model, before sampling parameters
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens and their log-probabilities, best first


class ChoosingText(Protocol):
    """What is known of a text when its next token is chosen."""

    name: str
    sampling: SamplingParameters
    wants_logprobs: bool
    top_logprobs: int
    generated_counts: Counter[int]

    @property
    def prompt_ids(self) -> Sequence[int]: ...

    @property
    def generated_ids(self) -> Sequence[int]: ...


def choose_tokens(texts: Sequence[ChoosingText], logits_BV: torch.Tensor) -> list[ChosenToken | MoeClusterError]:
    """A token for each text, or why it gets none: what goes wrong for one is that one's alone.

    logits_BV: float32, a row for each text; stays as it is.
    """
    highest_B, best_B = logits_BV.max(dim=-1)
    rows = zip(texts, logits_BV, highest_B.tolist(), best_B.tolist(), strict=True)
    return [_choose_alone(text, logits_V, highest, best) for text, logits_V, highest, best in rows]


def _choose_alone(
    text: ChoosingText, logits_V: torch.Tensor, highest: float, best: int
) -> ChosenToken | MoeClusterError:
    try:
        if not math.isfinite(highest):  # of a row with NaN it is NaN
            raise RequestFailed("the model's logits are NaN or infinite")
        token = best if _takes_best(text.sampling) else _choose(text, logits_V)
        return _with_logprobs(text, logits_V, token) if text.wants_logprobs else ChosenToken(id=token)
    except Exception as exc:
        return text_error(text.name, exc, "choosing its next token")


def _takes_best(sampling: SamplingParameters) -> bool:
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


def _choose(text: ChoosingText, logits_V: torch.Tensor) -> int:
    sampling = text.sampling
    if _changes_logits(sampling):
        logits_V = penalised(text, logits_V)
    if _is_greedy(sampling):
        return int(logits_V.argmax())
    position = len(text.prompt_ids) + len(text.generated_ids)
    return draw(logits_V, sampling, keyed_uniform(sampling.seed, position))


def penalised(text: ChoosingText, logits_V: torch.Tensor) -> torch.Tensor:
    """The logits after penalties and biases, as a copy in float64, in which no accepted penalty overflows.

    repetition_penalty counts prompt and text (Keskar et al., CTRL, 2019); presence and frequency count the text alone,
    as OpenAI's API has them: logit - presence - frequency x count.
    """
    sampling, logits_V = text.sampling, logits_V.double().clone()
    if sampling.repetition_penalty not in (0.0, 1.0):
        seen = torch.tensor(sorted({*text.prompt_ids, *text.generated_ids}), device=logits_V.device)
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if text.generated_counts and (sampling.presence_penalty or sampling.frequency_penalty):
        written = torch.tensor(list(text.generated_counts), device=logits_V.device)
        counts = torch.tensor(list(text.generated_counts.values()), device=logits_V.device, dtype=logits_V.dtype)
        logits_V[written] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    for token, bias in sampling.logit_bias.items():
        logits_V[token] += bias
    return logits_V


def draw(logits_V: torch.Tensor, sampling: SamplingParameters, uniform: float) -> int:
    """A token of softmax(logits / temperature), of which top_k, then top_p, then min_p leave the likely part.

    The highest logit is finite, the temperature GREEDY_BELOW or more.
    """
    scaled_V = (logits_V - logits_V.max()) / sampling.temperature
    if sampling.top_k or 0 < sampling.top_p < 1 or sampling.min_p:
        ids, probabilities = _likely(torch.softmax(scaled_V, dim=-1), sampling)
        return int(ids[_position(probabilities, uniform)])
    return _position(torch.softmax(scaled_V, dim=-1), uniform)


def _likely(probabilities_V: torch.Tensor, sampling: SamplingParameters) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, probabilities) of what top_k, top_p and min_p leave, the most likely first; they need not sum to 1."""
    size = len(probabilities_V)
    wanted = min(sampling.top_k or size, size)
    values, ids = torch.topk(probabilities_V, min(wanted, MOST_LIKELY))
    # The mass that top_p is a part of: what top_k has left.
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
    """A number in [0, 1) that depends on nothing but seed and position."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _with_logprobs(text: ChoosingText, logits_V: torch.Tensor, token: int) -> ChosenToken:
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if text.top_logprobs:
        values, ids = torch.topk(logprobs_V, min(text.top_logprobs, len(logprobs_V)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return ChosenToken(id=token, logprob=float(logprobs_V[token]), top=top)
