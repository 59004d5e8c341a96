"""Clients of the HTTP gateway that stream completions one after another, and prompts with unambiguous outputs."""

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moecluster.models.tokenizer.decoding import Detokenizer
from moecluster.models.tokenizer.detokenizer import StreamingDecoder

CLEAR_GAP = 1e-3  # between the two best logits, in float32: far more than another summation order changes
JOIN_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 170.0
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "seed": 5}


@torch.no_grad()
def clear_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int, count: int
) -> dict[str, str]:
    """Returns the first `count` prompts whose greedy output has no near tie, with that output."""
    found: dict[str, str] = {}
    for prompt in prompts:
        ids = list(tokenizer(prompt)["input_ids"])
        begun, decoder, text = len(ids), StreamingDecoder(Detokenizer(tokenizer)), ""
        for _ in range(new_tokens):
            best = model(torch.tensor([ids])).logits[0, -1].topk(2)
            if float(best.values[0] - best.values[1]) < CLEAR_GAP:
                break
            ids.append(int(best.indices[0]))
            text += decoder.push(ids[-1])
        if len(ids) == begun + new_tokens:
            found[prompt] = text + decoder.finish()
        if len(found) == count:
            return found
    raise AssertionError(f"only {len(found)} of {count} prompts have texts without near ties")


@dataclass(frozen=True, kw_only=True)
class StreamedRequest:
    """One request, as its client saw it. Times by time.monotonic."""

    prompt: str
    sampled: bool
    text: str
    failure: str  # empty: none
    tokens: int
    chunks_s: tuple[float, ...]
    started_s: float
    ended_s: float


class HttpClients:
    """Clients that stream one request after another, from __enter__ to __exit__, in a thread with an event loop."""

    def __init__(
        self, url: str, model: str, prompts: Sequence[str], *, number: int, new_tokens: int, pause_s: float = 0.0
    ) -> None:
        """Every fourth request samples with a seed; the others are greedy. pause_s: of a client between two."""
        self.texts: list[StreamedRequest] = []
        self._url, self._model = url, model
        self._prompts = itertools.cycle(prompts)
        self._turn = itertools.count()
        self._number, self._new_tokens, self._pause_s = number, new_tokens, pause_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(JOIN_TIMEOUT_S)
        assert not self._thread.is_alive(), "a stream hangs"

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=self._number + 1)
        async with httpx.AsyncClient(base_url=self._url, timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
            await asyncio.gather(*(self._one_after_another(client) for _ in range(self._number)))

    async def _one_after_another(self, client: httpx.AsyncClient) -> None:
        while True:  # at least one request each, however soon __exit__ comes
            sampled = next(self._turn) % 4 == 3
            self.texts.append(
                await stream_request(
                    client, self._model, next(self._prompts), new_tokens=self._new_tokens, sampled=sampled
                )
            )
            if self._over.is_set():
                return
            await asyncio.sleep(self._pause_s)


async def stream_request(
    client: httpx.AsyncClient, model: str, prompt: str, *, new_tokens: int, sampled: bool
) -> StreamedRequest:
    """Streams one completion."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(SAMPLED if sampled else {"temperature": 0}),
    }
    started_s, text, chunks_s, reason, failure, tokens = time.monotonic(), "", [], None, "", 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                failure = f"{answer.status_code}: {(await answer.aread()).decode()}"
            else:
                async for event in events(answer):
                    failure = failure or str(event.get("error", ""))
                    for choice in event.get("choices", []):
                        text += choice["text"]
                        reason = choice["finish_reason"] or reason
                        chunks_s.append(time.monotonic())
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except httpx.HTTPError as exc:
        failure = repr(exc)
    if not failure and reason not in ("stop", "length"):
        failure = f"ended by {reason!r}"
    return StreamedRequest(
        prompt=prompt,
        sampled=sampled,
        text=text,
        failure=failure,
        tokens=tokens,
        chunks_s=tuple(chunks_s),
        started_s=started_s,
        ended_s=time.monotonic(),
    )


async def events(answer: httpx.Response) -> Any:
    """Yields the JSON events of a stream. Asserts that it ends with [DONE]."""
    done = False
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    assert done, "the stream ended without [DONE]"


def assert_all_right(
    texts: Sequence[StreamedRequest], greedy: Mapping[str, str], sampled: Mapping[str, str], new_tokens: int
) -> None:
    """Asserts that no request failed, no token was lost or repeated, and every output is the expected one."""
    failed = [f"{t.prompt!r} after {t.ended_s - t.started_s:.1f} s: {t.failure}" for t in texts if t.failure]
    assert not failed, failed[:5]
    for text in texts:
        expected = (sampled if text.sampled else greedy)[text.prompt]
        assert text.text == expected, (text.prompt, text.sampled, text.text, expected)
        assert text.tokens == new_tokens
