"""Encodes records as the router's messages, and decodes and checks messages."""

import json
import math

from moecluster.errors import Exhausted, InvalidMessage
from moecluster.generation import GenerationChunk, GenerationRequest, SamplingParameters, TokenLogprob
from moecluster.proto import router_pb2
from moecluster.rpc.fields import (
    checked_count,
    checked_name,
    checked_optional_address,
    checked_within,
    decode_experts,
    encode_expert,
)
from moecluster.types import PlacementNumber, RouterStatus

MAX_PROMPT_CHARACTERS = 2**20
MAX_PROMPT_IDS = 2**18
MAX_NEW_TOKENS = 2**16
MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY = 0.01
MAX_TOP_K = 2**20
MAX_PENALTY = 100.0
MAX_BIAS = 1000.0
MAX_BIASES = 1024
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOP_LOGPROBS = 20


def encode_generation_request(request: GenerationRequest) -> router_pb2.GenerateRequest:
    """Returns the message of a request."""
    sampling = request.sampling
    return router_pb2.GenerateRequest(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_ids=request.prompt_ids,
        messages_json=request.messages_json,
        max_new_tokens=request.max_new_tokens,
        stop=request.stop,
        ignore_eos=request.ignore_eos,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        generated_ids=request.generated_ids,
        weight_version=request.weight_version,
    )


def decode_generation_request(message: router_pb2.GenerateRequest) -> GenerationRequest:
    """Returns the request of a message. Raises InvalidMessage, or Exhausted for what is too large, naming the field."""
    for name, size, limit in (
        ("prompt", len(message.prompt), MAX_PROMPT_CHARACTERS),
        ("prompt_ids", len(message.prompt_ids), MAX_PROMPT_IDS),
        ("messages_json", len(message.messages_json), MAX_PROMPT_CHARACTERS),
        ("generated_ids", len(message.generated_ids), MAX_NEW_TOKENS),
    ):
        if size > limit:
            raise Exhausted(f"{name}: {size} {'ids' if name.endswith('ids') else 'characters'}, at most {limit}")
    if message.max_new_tokens > MAX_NEW_TOKENS:
        raise Exhausted(f"max_new_tokens: {message.max_new_tokens}, at most {MAX_NEW_TOKENS}")
    if sum(map(bool, (message.prompt, message.prompt_ids, message.messages_json))) != 1:
        raise InvalidMessage(
            "prompt", "give a text that is not empty, or prompt_ids, or messages_json, one of the three"
        )
    if message.messages_json:
        _check_messages(message.messages_json)
    checked_count(message.max_new_tokens, "max_new_tokens")
    # Exactly max_new_tokens is valid: the router that generated them was lost before it sent the last chunk.
    if 0 < message.max_new_tokens < len(message.generated_ids):
        raise InvalidMessage("generated_ids", f"{len(message.generated_ids)}, more than max_new_tokens")
    if message.weight_version and not message.generated_ids:
        raise InvalidMessage("weight_version", f"{message.weight_version}, and a new request has none of its own")
    return GenerationRequest(
        request_id=checked_name(message.request_id, "request_id"),
        prompt=message.prompt,
        prompt_ids=tuple(message.prompt_ids),
        messages_json=message.messages_json,
        max_new_tokens=message.max_new_tokens,
        stop=_checked_stops(message),
        ignore_eos=message.ignore_eos,
        sampling=_decode_sampling(message),
        logprobs=message.logprobs,
        top_logprobs=int(checked_within(message.top_logprobs, 0, MAX_TOP_LOGPROBS, "top_logprobs")),
        generated_ids=tuple(message.generated_ids),
        weight_version=message.weight_version,
    )


def _check_messages(text: str) -> None:
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidMessage("messages_json", f"no JSON: {exc}") from exc
    if not isinstance(messages, list) or not messages:
        raise InvalidMessage("messages_json", "expected a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidMessage("messages_json", f'message {i} is no object with a "role"')
        content = message.get("content")
        if not isinstance(content, str) and not _are_text_parts(content):
            raise InvalidMessage("messages_json", f'the "content" of message {i} is no text and no list of text parts')


def _are_text_parts(content: object) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(
            isinstance(part, dict)
            and part.keys() == {"type", "text"}
            and part["type"] == "text"
            and isinstance(part["text"], str)
            for part in content
        )
    )


def _checked_stops(message: router_pb2.GenerateRequest) -> tuple[str, ...]:
    if len(message.stop) > MAX_STOPS:
        raise InvalidMessage("stop", f"{len(message.stop)} texts, at most {MAX_STOPS}")
    for stop in message.stop:
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidMessage("stop", f"a text of {len(stop)} characters, expected 1 to {MAX_STOP_CHARACTERS}")
    return tuple(message.stop)


def _decode_sampling(message: router_pb2.GenerateRequest) -> SamplingParameters:
    if len(message.logit_bias) > MAX_BIASES:
        raise InvalidMessage("logit_bias", f"{len(message.logit_bias)} tokens, at most {MAX_BIASES}")
    return SamplingParameters(
        temperature=checked_within(message.temperature, 0, MAX_TEMPERATURE, "temperature"),
        top_p=checked_within(message.top_p, 0, 1, "top_p"),
        top_k=int(checked_within(message.top_k, 0, MAX_TOP_K, "top_k")),
        min_p=checked_within(message.min_p, 0, 1, "min_p"),
        seed=message.seed,
        repetition_penalty=message.repetition_penalty
        and checked_within(message.repetition_penalty, MIN_REPETITION_PENALTY, MAX_PENALTY, "repetition_penalty"),
        presence_penalty=checked_within(message.presence_penalty, -MAX_PENALTY, MAX_PENALTY, "presence_penalty"),
        frequency_penalty=checked_within(message.frequency_penalty, -MAX_PENALTY, MAX_PENALTY, "frequency_penalty"),
        logit_bias={
            checked_count(token, "logit_bias"): checked_within(bias, -MAX_BIAS, MAX_BIAS, "logit_bias")
            for token, bias in message.logit_bias.items()
        },
    )


def encode_chunk(chunk: GenerationChunk) -> router_pb2.GenerateReply:
    """Returns the message of a chunk."""
    return router_pb2.GenerateReply(
        ids=chunk.ids,
        text=chunk.text,
        logprobs=[_encode_logprob(logprob) for logprob in chunk.logprobs],
        finish_reason=chunk.finish_reason,
        prompt_tokens=chunk.prompt_tokens,
        cached_tokens=chunk.cached_tokens,
        weight_version=chunk.weight_version,
        experts=[
            router_pb2.ExpertCount(expert=encode_expert(expert), assignments=assignments)
            for expert, assignments in chunk.experts.items()
        ],
    )


def decode_chunk(message: router_pb2.GenerateReply) -> GenerationChunk:
    """Returns the chunk of a message. Raises InvalidMessage, naming the field."""
    if message.logprobs and len(message.logprobs) != len(message.ids):
        raise InvalidMessage("logprobs", f"{len(message.logprobs)} for {len(message.ids)} ids")
    experts = decode_experts([entry.expert for entry in message.experts], "experts.expert")
    return GenerationChunk(
        ids=tuple(message.ids),
        text=message.text,
        logprobs=tuple(_decode_logprob(logprob) for logprob in message.logprobs),
        finish_reason=message.finish_reason,
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        weight_version=message.weight_version,
        experts=dict(zip(experts, (entry.assignments for entry in message.experts), strict=True)),
    )


def _encode_logprob(logprob: TokenLogprob) -> router_pb2.TokenLogprob:
    return router_pb2.TokenLogprob(
        id=logprob.id,
        logprob=logprob.logprob,
        token=logprob.token,
        top=[_encode_logprob(alternative) for alternative in logprob.top],
    )


def _decode_logprob(message: router_pb2.TokenLogprob) -> TokenLogprob:
    if math.isnan(message.logprob):
        raise InvalidMessage("logprobs.logprob", "not a number")
    return TokenLogprob(
        id=message.id,
        logprob=message.logprob,
        token=message.token,
        top=tuple(TokenLogprob(id=top.id, logprob=top.logprob, token=top.token) for top in message.top),
    )


def encode_router_status(status: RouterStatus) -> router_pb2.RouterStatus:
    """Returns the message of a router's status."""
    return router_pb2.RouterStatus(
        router=status.router,
        model=status.model,
        placement_term=status.placement.term,
        generation=status.placement.generation,
        running=status.running,
        rss_bytes=status.rss_bytes,
        waiting=status.waiting,
        weight_version=status.weight_version,
        max_tokens=status.max_tokens,
        controller=status.controller,
    )


def decode_router_status(message: router_pb2.RouterStatus) -> RouterStatus:
    """A router's status of a message. Raises InvalidMessage, naming the field."""
    return RouterStatus(
        router=message.router,
        model=message.model,
        placement=PlacementNumber(message.placement_term, message.generation),
        running=message.running,
        rss_bytes=message.rss_bytes,
        waiting=message.waiting,
        weight_version=message.weight_version,
        max_tokens=message.max_tokens,
        controller=checked_optional_address(message.controller, "controller"),
    )
