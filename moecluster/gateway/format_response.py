"""Formats the choices of a job as OpenAI responses, whole or as the chunks of a stream."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moecluster.gateway.logprobs import CompletionLogprobs, chat_logprobs
from moecluster.gateway.parse_request import GenerationJob
from moecluster.generation import GenerationChunk, TokenLogprob


@dataclass
class GeneratedChoice:
    """One choice, as far as it is generated."""

    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    begun: bool = False  # its first stream chunk was sent
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None

    def add(self, chunk: GenerationChunk) -> None:
        """Adds the next chunk."""
        self.parts.append(chunk.text)
        self.logprobs += chunk.logprobs
        self.tokens += len(chunk.ids)
        if chunk.finish_reason:
            self.finish_reason = chunk.finish_reason
            self.prompt_tokens, self.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens

    @property
    def text(self) -> str:
        """The text of all chunks so far."""
        return "".join(self.parts)


class ResponseFormatter(ABC):
    """Formats the choices of one job. Chunks are added one by one, in the order in which they arrive."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, job: GenerationJob, model: str) -> None:
        self._job = job
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.whole_object,
            "created": int(time.time()),
            "model": model,
        }
        self._choices = [GeneratedChoice() for _ in job.requests]

    def add(self, index: int, chunk: GenerationChunk) -> None:
        """Adds a chunk of a choice, for `whole`."""
        self._choices[index].add(chunk)

    def whole(self) -> dict[str, Any]:
        """Returns the response, once all choices have ended."""
        choices = [
            {**self._whole_choice(index, choice), "index": index, "finish_reason": choice.finish_reason}
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def events(self, index: int, chunk: GenerationChunk) -> Iterator[dict[str, Any]]:
        """Yields the stream chunk for a chunk of a choice, or nothing if there is nothing to send."""
        choice = self._choices[index]
        first, choice.begun = not choice.begun, True
        choice.tokens += len(chunk.ids)
        if chunk.finish_reason:
            choice.add(GenerationChunk(
                finish_reason=chunk.finish_reason, prompt_tokens=chunk.prompt_tokens, cached_tokens=chunk.cached_tokens
            ))  # fmt: skip
        if first or chunk.text or chunk.logprobs or chunk.finish_reason:
            yield self._chunk(
                [{**self._chunk_choice(index, chunk, first), "index": index,
                  "finish_reason": chunk.finish_reason or None}]
            )  # fmt: skip

    def last_events(self) -> Iterator[dict[str, Any]]:
        """Yields the chunks after all choices: the usage, if the client asked for it."""
        if self._job.include_usage:
            yield {**self._chunk([]), "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        return {**chunk, "usage": None} if self._job.include_usage else chunk

    def _usage(self) -> dict[str, Any]:
        """Counts a prompt once, however many choices it has."""
        of_prompts = self._choices[:: self._job.n]
        prompt_tokens = sum(choice.prompt_tokens for choice in of_prompts)
        tokens = sum(choice.tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in of_prompts)},
        }

    @abstractmethod
    def _whole_choice(self, index: int, choice: GeneratedChoice) -> dict[str, Any]: ...

    @abstractmethod
    def _chunk_choice(self, index: int, chunk: GenerationChunk, first: bool) -> dict[str, Any]: ...


class CompletionFormatter(ResponseFormatter):
    """Formats responses of /v1/completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, job: GenerationJob, model: str) -> None:
        super().__init__(job, model)
        self._logprobs = [CompletionLogprobs() for _ in job.requests]

    def _whole_choice(self, index: int, choice: GeneratedChoice) -> dict[str, Any]:
        return {"text": self._echo(index) + choice.text, "logprobs": self._to_openai(index, choice.logprobs)}

    def _chunk_choice(self, index: int, chunk: GenerationChunk, first: bool) -> dict[str, Any]:
        text = self._echo(index) + chunk.text if first else chunk.text
        return {"text": text, "logprobs": self._to_openai(index, chunk.logprobs)}

    def _echo(self, index: int) -> str:
        return self._job.echoes[index // self._job.n] if self._job.echoes else ""

    def _to_openai(self, index: int, tokens: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        return self._logprobs[index].to_openai(tokens) if self._job.requests[index].logprobs else None


class ChatFormatter(ResponseFormatter):
    """Formats responses of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _whole_choice(self, index: int, choice: GeneratedChoice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = chat_logprobs(choice.logprobs) if self._job.requests[index].logprobs else None
        return {"message": message, "logprobs": logprobs}

    def _chunk_choice(self, index: int, chunk: GenerationChunk, first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant", "content": chunk.text} if first else {}
        if chunk.text:
            delta["content"] = chunk.text
        return {"delta": delta, "logprobs": chat_logprobs(chunk.logprobs) if chunk.logprobs else None}
