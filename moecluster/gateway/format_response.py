"""The pieces of a job's texts in OpenAI's two forms, whole or as the chunks of a stream."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moecluster.gateway.logprobs import CompletionLogprobs, chat_logprobs
from moecluster.gateway.parse_request import Job
from moecluster.generation import GenerationPiece, TokenLogprob


@dataclass
class Written:
    """What came of one text so far."""

    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    begun: bool = False  # of a stream: something was told
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None

    def add(self, piece: GenerationPiece) -> None:
        """The next piece."""
        self.parts.append(piece.text)
        self.logprobs += piece.logprobs
        self.tokens += len(piece.ids)
        if piece.finish_reason:
            self.finish_reason = piece.finish_reason
            self.prompt_tokens, self.cached_tokens = piece.prompt_tokens, piece.cached_tokens

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.parts)


class Form(ABC):
    """How the texts of one job are told. Pieces are added one by one, in the order in which they come."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, job: Job, model: str) -> None:
        self._job = job
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.whole_object,
            "created": int(time.time()),
            "model": model,
        }
        self._written = [Written() for _ in job.requests]

    def add(self, index: int, piece: GenerationPiece) -> None:
        """A piece of a text, for `whole`."""
        self._written[index].add(piece)

    def whole(self) -> dict[str, Any]:
        """The answer, when all texts have ended."""
        choices = [
            {**self._whole_choice(index, written), "index": index, "finish_reason": written.finish_reason}
            for index, written in enumerate(self._written)
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def chunks(self, index: int, piece: GenerationPiece) -> Iterator[dict[str, Any]]:
        """A piece of a text, as it is streamed: in one chunk, or none where nothing is to be told."""
        written = self._written[index]
        first, written.begun = not written.begun, True
        written.tokens += len(piece.ids)
        if piece.finish_reason:
            written.add(GenerationPiece(
                finish_reason=piece.finish_reason, prompt_tokens=piece.prompt_tokens, cached_tokens=piece.cached_tokens
            ))  # fmt: skip
        if first or piece.text or piece.logprobs or piece.finish_reason:
            yield self._chunk(
                [{**self._chunk_choice(index, piece, first), "index": index,
                  "finish_reason": piece.finish_reason or None}]
            )  # fmt: skip

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """What stands behind all texts."""
        if self._job.include_usage:
            yield {**self._chunk([]), "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        return {**chunk, "usage": None} if self._job.include_usage else chunk

    def _usage(self) -> dict[str, Any]:
        """A prompt counts once, however many texts were asked of it."""
        of_prompts = self._written[:: self._job.n]
        prompt_tokens = sum(written.prompt_tokens for written in of_prompts)
        tokens = sum(written.tokens for written in self._written)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": sum(written.cached_tokens for written in of_prompts)},
        }

    @abstractmethod
    def _whole_choice(self, index: int, written: Written) -> dict[str, Any]: ...

    @abstractmethod
    def _chunk_choice(self, index: int, piece: GenerationPiece, first: bool) -> dict[str, Any]: ...


class CompletionForm(Form):
    """Of /v1/completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, job: Job, model: str) -> None:
        super().__init__(job, model)
        self._logprobs = [CompletionLogprobs() for _ in job.requests]

    def _whole_choice(self, index: int, written: Written) -> dict[str, Any]:
        return {"text": self._echo(index) + written.text, "logprobs": self._told(index, written.logprobs)}

    def _chunk_choice(self, index: int, piece: GenerationPiece, first: bool) -> dict[str, Any]:
        text = self._echo(index) + piece.text if first else piece.text
        return {"text": text, "logprobs": self._told(index, piece.logprobs)}

    def _echo(self, index: int) -> str:
        return self._job.echoes[index // self._job.n] if self._job.echoes else ""

    def _told(self, index: int, tokens: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        return self._logprobs[index].told(tokens) if self._job.requests[index].logprobs else None


class ChatForm(Form):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _whole_choice(self, index: int, written: Written) -> dict[str, Any]:
        message = {"role": "assistant", "content": written.text, "refusal": None}
        logprobs = chat_logprobs(written.logprobs) if self._job.requests[index].logprobs else None
        return {"message": message, "logprobs": logprobs}

    def _chunk_choice(self, index: int, piece: GenerationPiece, first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant", "content": piece.text} if first else {}
        if piece.text:
            delta["content"] = piece.text
        return {"delta": delta, "logprobs": chat_logprobs(piece.logprobs) if piece.logprobs else None}
