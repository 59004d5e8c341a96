"""A fake OpenAI server over real HTTP: supports what our HTTP clients need, and misbehaves on request."""

import asyncio
import json
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from tests.support.waiting import wait_until

WAIT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What happens to one attempt instead of a response."""

    status: int = 0
    retry_after: str = ""
    drops: bool = False  # the connection breaks in the middle of the response
    hangs: bool = False
    error_event: bool = False  # in the middle of a stream


@dataclass(kw_only=True)
class FakeOpenAI:
    """The server's script, and the requests that it received."""

    troubles: Mapping[str, Sequence[Trouble]] = field(default_factory=dict)  # prompt -> one for each attempt
    key: str = ""
    delay_s: float = 0.0  # before a response, or the first token of a stream
    token_s: float = 0.0  # between tokens
    url: str = ""
    seen: list[tuple[str, float]] = field(default_factory=list)  # (prompt, time) of every attempt
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    def times(self, prompt: str) -> list[float]:
        return [at_s for seen, at_s in self.seen if seen == prompt]

    def counts(self) -> dict[str, int]:
        """Returns the number of attempts by prompt."""
        counts: dict[str, int] = defaultdict(int)
        for prompt, _ in self.seen:
            counts[prompt] += 1
        return counts


def answer_to(prompt: str) -> str:
    """Returns the text that the server generates for a prompt."""
    return prompt[::-1].upper()


def build_app(stand_in: FakeOpenAI) -> FastAPI:
    app = FastAPI()

    def refused(status: int, message: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "x"}}, status_code=status, headers=headers)

    def has_key(request: Request) -> bool:
        return not stand_in.key or request.headers.get("authorization") == f"Bearer {stand_in.key}"

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if not has_key(request):
            return refused(401, "no such key")
        return JSONResponse({"data": [{"id": "stand-in"}]})

    @app.post("/v1/{kind:path}")
    async def complete(kind: str, request: Request) -> Response:
        body = json.loads(await request.body())
        chat = kind == "chat/completions"
        prompt = str(body["messages"][-1]["content"] if chat else body["prompt"])
        attempt = len(stand_in.times(prompt))
        stand_in.seen.append((prompt, time.monotonic()))
        stand_in.bodies.append(body)
        if not has_key(request):
            return refused(401, "no such key")
        troubles = stand_in.troubles.get(prompt, ())
        trouble = troubles[attempt] if attempt < len(troubles) else Trouble()
        if trouble.hangs:
            await asyncio.sleep(WAIT_S)
        if trouble.status:
            after = {"Retry-After": trouble.retry_after} if trouble.retry_after else {}
            return refused(trouble.status, f"trouble {trouble.status}", **after)
        if trouble.drops and not body.get("stream"):
            return StreamingResponse(broken_off(), headers={"Content-Length": "1000"}, media_type="application/json")
        if body.get("stream"):
            return StreamingResponse(events(body, trouble), media_type="text/event-stream")
        stand_in.running += 1
        stand_in.most_running = max(stand_in.most_running, stand_in.running)
        await asyncio.sleep(stand_in.delay_s)
        stand_in.running -= 1
        text = answer_to(prompt)
        output = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(text)}
        return JSONResponse({"choices": [output], "usage": usage}, headers={"x-request-id": f"request-{prompt}"})

    async def broken_off() -> AsyncIterator[bytes]:
        yield b'{"cho'
        raise ConnectionError("as the script wants it")

    async def events(body: dict[str, Any], trouble: Trouble) -> AsyncIterator[bytes]:
        def event(content: Any) -> bytes:
            return f"data: {json.dumps(content)}\n\n".encode()

        await asyncio.sleep(stand_in.delay_s)
        for token in range(body["max_tokens"]):
            if token:
                await asyncio.sleep(stand_in.token_s)
            if token == 1 and trouble.drops:
                raise ConnectionError("as the script wants it")
            if token == 1 and trouble.error_event:
                yield event({"error": {"message": "trouble amid the stream"}})
                return
            yield event({"choices": [{"text": f" {token}", "finish_reason": None}]})
        yield event({"choices": [{"text": "", "finish_reason": "length"}]})
        if body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            yield event({"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    return app


@contextmanager
def serving(stand_in: FakeOpenAI, *, port: int = 0) -> Iterator[FakeOpenAI]:
    """Context: serves in a thread, at stand_in.url."""
    config = uvicorn.Config(
        build_app(stand_in), port=port, log_config=None, lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive(), "the start of the fake server")
    assert thread.is_alive(), "the fake server did not start"
    host, bound = server.servers[0].sockets[0].getsockname()[:2]
    stand_in.url = f"http://{host}:{bound}"
    try:
        yield stand_in
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the stand-in does not end"
