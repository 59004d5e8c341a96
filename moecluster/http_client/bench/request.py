"""Sends one streamed completion and records when each chunk arrives."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from moecluster.http_client.bench.workload import Ask
from moecluster.http_client.connection import json_of, message_of

DATA = "data:"
DONE = "[DONE]"


@dataclass(kw_only=True)
class Measured:
    """Measurements of one request. Times are in seconds since the start of the load."""

    scheduled_s: float  # when it was scheduled to be sent
    sent_s: float
    ended_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)  # arrival time of each text chunk, usually one token
    prompt_tokens: int = 0  # as counted by the service
    output_tokens: int = 0
    error: str = ""  # a short kind; empty: it completed
    detail: str = ""  # of the error

    @property
    def time_to_first_token_s(self) -> float | None:
        """Since the scheduled time, so that falling behind the schedule counts against the service."""
        return self.chunks_s[0] - self.scheduled_s if self.chunks_s else None

    @property
    def inter_token_s(self) -> list[float]:
        return [after - before for before, after in zip(self.chunks_s, self.chunks_s[1:], strict=False)]

    @property
    def request_s(self) -> float:
        """Duration of the whole request, from its scheduled time."""
        return self.ended_s - self.scheduled_s

    @property
    def time_per_token_s(self) -> float | None:
        """Mean time per token after the first; None with fewer than two."""
        if self.output_tokens < 2 or len(self.chunks_s) < 2:
            return None
        return (self.chunks_s[-1] - self.chunks_s[0]) / (self.output_tokens - 1)


class Sender:
    """Sends the requests of one load, all with the same settings."""

    def __init__(
        self, gateway: httpx.AsyncClient, *, model: str, temperature: float, ignore_eos: bool, timeout_s: float
    ) -> None:
        """timeout_s: limit on a whole request."""
        self._gateway = gateway
        self._fixed: dict[str, Any] = {
            "model": model,
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ignore_eos:
            self._fixed["ignore_eos"] = True
        self._timeout_s = timeout_s

    async def send(self, ask: Ask, *, started_s: float, scheduled_s: float | None = None) -> Measured:
        """Sends one request. Never raises for its failure, which is recorded as the error."""
        now_s = time.perf_counter() - started_s
        seen = Measured(scheduled_s=now_s if scheduled_s is None else scheduled_s, sent_s=now_s)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(ask, seen, started_s)
        except (TimeoutError, httpx.TimeoutException):
            seen.error, seen.detail = "timeout", f"no end within {self._timeout_s:g} s"
        except httpx.ConnectError as exc:
            seen.error, seen.detail = "cannot connect", str(exc)
        except httpx.RequestError as exc:
            seen.error, seen.detail = "connection lost", str(exc) or type(exc).__name__
        seen.ended_s = time.perf_counter() - started_s
        return seen

    async def _stream(self, ask: Ask, seen: Measured, started_s: float) -> None:
        body = {**self._fixed, "prompt": ask.prompt, "max_tokens": ask.output_tokens, "seed": ask.seed}
        async with self._gateway.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                seen.error = f"status {answer.status_code}"
                seen.detail = message_of(json_of(await answer.aread()))
                return
            async for line in answer.aiter_lines():
                if not line.startswith(DATA):
                    continue
                content = line[len(DATA) :].strip()
                if content == DONE:
                    seen.output_tokens = seen.output_tokens or len(seen.chunks_s)
                    return
                _note(content, seen, time.perf_counter() - started_s)
                if seen.error:
                    return
        seen.error, seen.detail = "stream broke off", "its end never came"


def _note(content: str, seen: Measured, now_s: float) -> None:
    try:
        chunk = json.loads(content)
        if "error" in chunk:
            seen.error, seen.detail = "error in the stream", message_of(chunk)
            return
        if any(choice.get("text") for choice in chunk["choices"]):
            seen.chunks_s.append(now_s)
        if usage := chunk.get("usage"):
            seen.prompt_tokens, seen.output_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        seen.error, seen.detail = "malformed event", f"{exc!r} in {content[:100]}"
