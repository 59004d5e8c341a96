"""Texts for an engine in a test, and what came of them."""

from collections.abc import Callable
from typing import Any

from moecluster.generation import GenerationChunk, GenerationRequest, SamplingParameters
from moecluster.router.engine.engine import Engine, EngineLimits

PROMPT = tuple(b"The tower of")
SAMPLED = SamplingParameters(temperature=1.2, top_p=0.95, seed=11, frequency_penalty=0.3, repetition_penalty=1.1)
LIMITS = EngineLimits(max_running=4, max_waiting=2, max_cached_tokens=2048, max_batch_tokens=32)

MakeTestEngine = Callable[..., Engine]


def ask(name: str = "r", **fields: Any) -> GenerationRequest:
    return GenerationRequest(**{"request_id": name, "prompt_ids": PROMPT, "max_new_tokens": 24, **fields})


def write(engine: Engine, request: GenerationRequest) -> list[GenerationChunk]:
    return list(engine.begin(request, request.prompt_ids))


def ids_of(chunks: list[GenerationChunk]) -> list[int]:
    return [i for chunk in chunks for i in chunk.ids]


def text_of(chunks: list[GenerationChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)
