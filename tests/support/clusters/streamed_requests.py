"""Streamed texts of a gateway over scripted routers, and whether nothing of them is lost or repeated."""

from typing import Any

from tests.support.clusters.running_gateway import RunningGateway
from tests.support.fakes.fake_router import FakeRouter, word_ids, words

NOBODY = "127.0.0.1:1"
TEXT: dict[str, Any] = {"model": "model", "prompt": "once", "max_tokens": 30, "seed": 2, "logprobs": 1}


def read(stream: Any) -> tuple[str, list[str], int]:
    """(text, tokens, how many tokens in all) of a streamed completion."""
    text, tokens, count = "", [], 0
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.text
            tokens += choice.logprobs.tokens
        if chunk.usage is not None:
            count = chunk.usage.completion_tokens
    return text, tokens, count


def ask(gateway: RunningGateway, **changes: Any) -> tuple[str, list[str], int]:
    with gateway.openai() as client:
        return read(client.completions.create(
            **{**TEXT, **changes}, stream=True, stream_options={"include_usage": True}
        ))  # fmt: skip


def assert_whole(read: tuple[str, list[str], int], *routers: FakeRouter) -> None:
    request = next(router.requests[0] for router in routers if router.requests)
    ids = word_ids(request)
    text, tokens, count = read
    assert text == words(ids) and "".join(tokens) == text and count == len(ids)
