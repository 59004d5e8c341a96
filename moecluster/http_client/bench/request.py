"""One streamed completion, with the time of everything that came."""

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
    """What became of a request. Times are in seconds since the start of the load."""

    scheduled_s: float  # when it was to be sent
    sent_s: float
    ended_s: float = 0.0
    pieces_s: list[float] = field(default_factory=list)  # when each piece of text came, in most cases a token
    prompt_tokens: int = 0  # as the service counts
    output_tokens: int = 0
    error: str = ""  # a short kind; empty: it ended as it should
    detail: str = ""  # of the error

    @property
    def time_to_first_token_s(self) -> float | None:
        """From when it was to be sent, so that a load that falls behind counts against the service."""
        return self.pieces_s[0] - self.scheduled_s if self.pieces_s else None

    @property
    def inter_token_s(self) -> list[float]:
        return [after - before for before, after in zip(self.pieces_s, self.pieces_s[1:], strict=False)]

    @property
    def request_s(self) -> float:
        """The whole request, from when it was to be sent."""
        return self.ended_s - self.scheduled_s

    @property
    def time_per_token_s(self) -> float | None:
        """Mean after the first one. None where there is no second."""
        if self.output_tokens < 2 or len(self.pieces_s) < 2:
            return None
        return (self.pieces_s[-1] - self.pieces_s[0]) / (self.output_tokens - 1)


class Sender:
    """Sends requests of one load, all with the same settings."""

    def __init__(
        self, front: httpx.AsyncClient, *, model: str, temperature: float, ignore_eos: bool, timeout_s: float
    ) -> None:
        """timeout_s: longest whole request."""
        self._front = front
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
        """Never raises for what goes wrong with the request: that stands in its error."""
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
        async with self._front.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                seen.error = f"status {answer.status_code}"
                seen.detail = message_of(json_of(await answer.aread()))
                return
            async for line in answer.aiter_lines():
                if not line.startswith(DATA):
                    continue
                content = line[len(DATA) :].strip()
                if content == DONE:
                    seen.output_tokens = seen.output_tokens or len(seen.pieces_s)
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
            seen.pieces_s.append(now_s)
        if usage := chunk.get("usage"):
            seen.prompt_tokens, seen.output_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        seen.error, seen.detail = "malformed event", f"{exc!r} in {content[:100]}"
