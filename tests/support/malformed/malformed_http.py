"""HTTP requests, each broken in one of many ways; the same in every run."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

GENERATED = 400  # for a short test
BATCH = 500  # over one connection

COMPLETION: dict[str, Any] = {
    "model": "model", "prompt": "once", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 1, "stop": ["zz"],
    "logprobs": 1, "echo": False, "stream": False, "seed": 1, "presence_penalty": 0.1, "frequency_penalty": 0.1,
    "logit_bias": {"3": 1}, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": False,
    "stream_options": {"include_usage": True}, "best_of": 1, "user": "me",
}  # fmt: skip
CHAT: dict[str, Any] = {
    "model": "model", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
    "max_tokens": 2, "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 2, "temperature": 0.5, "n": 1,
    "stop": "zz", "stream": True, "tools": [], "response_format": {"type": "text"},
}  # fmt: skip
BODIES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
PATHS = (*BODIES, "/v1/models", "/v1/models/model", "/v1", "/v1/", "/v1/edits", "/", "/health", "/v1/completions/",
         "/v1/chat",
         "/v1/models/%00", "/v1/models/" + "x" * 2000, "//v1/completions", "/v1/completions?stream=1")  # fmt: skip
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, "", "x", "\ud800",
    "\x00", "ü" * 40, "5", [], [None], [[]], [[[]]], ["x", 1], [1, "x"], [2**40], {}, {"a": 1}, {"type": "text"},
    [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": 1, "content": {}}],
    {"include_usage": "yes"}, {"1": "x"}, {"-1": 1}, {"999999999": 1}, ["s"] * 40, [0] * 600, "x" * 5000,
)  # fmt: skip
RAW = (b"", b"{", b"[", b"null", b"true", b"3", b'"text"', b"[1, 2]", b"\xff\xfe", b"{'a': 1}", b'{"model": NaN}',
       b"{}", b"[" * 100_000, b'{"a":' * 50_000, b'{"model": "model", "prompt": "x"', b'{"prompt": "\\ud800"}',
       b"\x00" * 100,
       b'{"model": "model", "prompt": "x", "temperature": Infinity}', b"1" * 6000)  # fmt: skip
CONTENT_TYPES = ("application/json", "application/json", "application/json", "text/plain", "", "multipart/form-data",
                 "application/x-www-form-urlencoded", "application/json; charset=utf-16", "\u00fc/json")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BadRequest:
    """A request to send."""

    method: str
    path: str
    content: bytes
    content_type: str


def _strange(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(STRANGE))


def _changed_field(rng: random.Random, body: dict[str, Any]) -> None:
    body[rng.choice(list(body))] = _strange(rng)


def _missing_field(rng: random.Random, body: dict[str, Any]) -> None:
    del body[rng.choice(list(body))]


def _new_field(rng: random.Random, body: dict[str, Any]) -> None:
    body[rng.choice(["tools", "suffix", "audio", "response_format", "functions", "x", ""])] = _strange(rng)


def _deep_change(rng: random.Random, body: dict[str, Any]) -> None:
    inner = [value for value in body.values() if isinstance(value, dict | list) and value]
    if not inner:
        return _changed_field(rng, body)
    chosen: Any = rng.choice(inner)
    key = rng.choice(list(chosen)) if isinstance(chosen, dict) else rng.randrange(len(chosen))
    if chosen[key] and isinstance(chosen[key], dict) and rng.random() < 0.7:
        chosen, key = chosen[key], rng.choice(list(chosen[key]))
    chosen[key] = _strange(rng)
    return None


BREAKS: tuple[Callable[[random.Random, dict[str, Any]], None], ...] = (
    _changed_field, _changed_field, _missing_field, _new_field, _deep_change,
)  # fmt: skip


def bad_requests(count: int, seed: int = 0) -> Iterator[BadRequest]:
    """Yields requests, most with a wrong field in the body; some with a wrong body, method, path or content type."""
    rng = random.Random(seed)
    for _ in range(count):
        path = rng.choice(list(BODIES))
        body = json.loads(json.dumps(BODIES[path]))
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            rng.choice(BREAKS)(rng, body)
        content = json.dumps(body).encode()
        method, content_type = "POST", "application/json"
        match rng.randrange(12):
            case 0:
                content = rng.choice(RAW)
            case 1:
                content = _damaged(rng, content)
            case 2:
                method, path = (
                    rng.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "POST"]),
                    rng.choice(PATHS),
                )
            case 3:
                content_type = rng.choice(CONTENT_TYPES)
        yield BadRequest(method=method, path=path, content=content, content_type=content_type)


def _damaged(rng: random.Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.randrange(1, 6)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged[: rng.randrange(len(damaged) // 2, len(damaged) + 1)])


def assert_in_openais_form(status: int, content: bytes, what: object) -> None:
    """Asserts that there is no server error, and that an error has the body that OpenAI's clients expect."""
    assert status < 500 and status != 422, (what, content)
    if status >= 400:
        error = json.loads(content)["error"]
        assert set(error) == {"message", "type", "param", "code"}, what
        assert error["message"] and isinstance(error["message"], str) and isinstance(error["type"], str), what


def send_bad_requests(url: str, count: int, seed: int = 0) -> dict[int, int]:
    """Sends `count` requests; returns the number of responses by status."""
    seen: dict[int, int] = {}
    client = httpx.Client(timeout=30.0)
    for number, bad in enumerate(bad_requests(count, seed)):
        if number % BATCH == 0:
            client.close()
            client = httpx.Client(timeout=30.0)
        headers = {b"Content-Type": bad.content_type.encode()} if bad.content_type else {}
        answer = client.request(bad.method, url + bad.path, content=bad.content, headers=headers)
        if bad.method != "HEAD":  # its response has no body
            assert_in_openais_form(answer.status_code, answer.content, bad)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
    client.close()
    return seen
