"""Builds a generation request from the arguments of a client's call."""

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack

from moecluster.errors import InvalidMessage
from moecluster.generation import GenerationRequest, SamplingParameters
from moecluster.rpc.router.messages import encode_generation_request

MAX_NEW_TOKENS = 256


class SamplingOptions(TypedDict, total=False):
    """How the next token is sampled. An omitted option is off; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int  # the same seed samples the same tokens
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]


class GenerationOptions(SamplingOptions, total=False):
    """Options of a generation."""

    max_new_tokens: int  # 256 by default; 0: as many as the model has room for
    stop: str | Sequence[str]  # stop strings, not part of the result
    ignore_eos: bool
    logprobs: bool  # of every token
    top_logprobs: int  # number of alternatives at each token, with their log-probabilities


def build_request(
    prompt: str,
    prompt_ids: Sequence[int],
    messages: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: str | Sequence[str] = (),
    ignore_eos: bool = False,
    logprobs: bool = False,
    top_logprobs: int = 0,
    **sampling: Unpack[SamplingOptions],
) -> GenerationRequest:
    """Returns the request. Raises InvalidMessage for what the wire cannot carry; the router checks the rest."""
    request = GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompt=prompt,
        prompt_ids=tuple(prompt_ids),
        messages_json=json.dumps(list(messages)) if messages else "",
        max_new_tokens=max_new_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_eos=ignore_eos,
        sampling=SamplingParameters(**sampling),
        logprobs=logprobs or top_logprobs > 0,
        top_logprobs=top_logprobs,
    )
    try:
        encode_generation_request(request)
    except (ValueError, TypeError) as exc:
        raise InvalidMessage("request", str(exc)) from exc
    return request
