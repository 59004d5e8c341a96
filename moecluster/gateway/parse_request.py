"""Parses a body into requests to routers, one for each choice."""

import json
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from moecluster.gateway.api_errors import bad_request
from moecluster.gateway.schemas.requests import (
    DEFAULT_MAX_TOKENS,
    MAX_CHOICES,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationFields,
)
from moecluster.generation import GenerationRequest, SamplingParameters
from moecluster.rpc.router.messages import MAX_PROMPT_CHARACTERS

SEEDS = 2**64
SMALLEST_TOP_P = 1e-9  # for OpenAI 0 means the best token alone; for a router it means off


@dataclass(frozen=True, kw_only=True)
class GenerationJob:
    """The choices of one body. Choice i of prompt p has index p * n + i."""

    requests: tuple[GenerationRequest, ...]
    n: int  # choices of each prompt
    echoes: tuple[str, ...] = ()  # for each prompt, what its choices begin with; empty: no echo
    stream: bool
    include_usage: bool  # at the end of a stream


def parse_completion(body: CompletionRequest) -> GenerationJob:
    """Returns the job of a body of /v1/completions. Raises ApiError."""
    if body.best_of not in (None, body.n or 1):
        raise bad_request("best_of: only as many as n", param="best_of", code="unsupported_parameter")
    prompts = _prompts(body)
    echoes: tuple[str, ...] = ()
    if body.echo:
        if not isinstance(prompts[0], str):
            raise bad_request("echo: only for prompts given as text", param="echo", code="unsupported_parameter")
        if body.logprobs is not None:
            raise bad_request("echo: not together with logprobs", param="echo", code="unsupported_parameter")
        echoes = tuple(prompt for prompt in prompts if isinstance(prompt, str))
    starts = [
        GenerationRequest(
            request_id="", prompt=prompt if isinstance(prompt, str) else "",
            prompt_ids=() if isinstance(prompt, str) else tuple(prompt),
        )
        for prompt in prompts
    ]  # fmt: skip
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return _job(body, starts, max_tokens=max_tokens, top_logprobs=body.logprobs, echoes=echoes)


def parse_chat(body: ChatCompletionRequest) -> GenerationJob:
    """Returns the job of a body of /v1/chat/completions. Raises ApiError.

    Without a limit, a choice may be as long as the model has room for.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs: only together with logprobs = true", param="top_logprobs")
    messages = [
        # OpenAI renamed the system role to developer; few chat templates know that role.
        {"role": "system" if message.role == "developer" else message.role, "content": message.parts_or_text}
        | ({"name": message.name} if message.name else {})
        for message in body.messages
    ]
    text = json.dumps(messages, ensure_ascii=False)
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise bad_request(
            f"messages: {len(text)} characters, at most {MAX_PROMPT_CHARACTERS}",
            param="messages",
            code="context_length_exceeded",
        )
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise bad_request("max_tokens: another number than max_completion_tokens; give one of them", param="max_tokens")
    max_tokens = body.max_completion_tokens or body.max_tokens or 0
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    start = GenerationRequest(request_id="", messages_json=text)
    return _job(body, [start], max_tokens=max_tokens, top_logprobs=top_logprobs)


def _prompts(body: CompletionRequest) -> Sequence[str] | Sequence[Sequence[int]]:
    """Returns the prompts as a list, whatever form they were given in."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    first = prompt[0]
    return [prompt] if isinstance(first, int) else prompt  # type: ignore[return-value]  # of one kind


def _job(
    body: GenerationFields,
    starts: Sequence[GenerationRequest],
    *,
    max_tokens: int,
    top_logprobs: int | None,
    echoes: tuple[str, ...] = (),
) -> GenerationJob:
    n = body.n or 1
    if len(starts) * n > MAX_CHOICES:
        raise bad_request(f"n: {len(starts)} prompts and n = {n} are more than {MAX_CHOICES} choices", param="n")
    name = uuid.uuid4().hex
    seed = secrets.randbits(63) if body.seed is None else body.seed
    requests = tuple(
        GenerationRequest(
            request_id=f"{name}.{p * n + i}",
            prompt=start.prompt,
            prompt_ids=start.prompt_ids,
            messages_json=start.messages_json,
            max_new_tokens=max_tokens,
            stop=_stops(body),
            ignore_eos=bool(body.ignore_eos),
            sampling=_sampling(body, (seed + i) % SEEDS),
            logprobs=top_logprobs is not None,
            top_logprobs=top_logprobs or 0,
        )
        for p, start in enumerate(starts)
        for i in range(n)
    )
    options = body.stream_options
    return GenerationJob(
        requests=requests,
        n=n,
        echoes=echoes,
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
    )


def _stops(body: GenerationFields) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def _sampling(body: GenerationFields, seed: int) -> SamplingParameters:
    top_p = 1.0 if body.top_p is None else body.top_p
    penalty = body.repetition_penalty
    return SamplingParameters(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=0.0 if top_p == 1.0 else max(top_p, SMALLEST_TOP_P),
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=seed,
        repetition_penalty=0.0 if penalty is None or penalty == 1.0 else penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
    )
