"""Sends one line of a batch until there is a final answer."""

import asyncio
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from moecluster.errors import ConfigError, Unavailable
from moecluster.http_client.batch.lines import BatchLine
from moecluster.http_client.connection import json_of, message_of, retry_after_s

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
REFUSED = (429, 503)  # not about the line: the gateway is full, or nobody serves the model
BROKEN = (408, 500, 502, 504)  # may be the line's fault, or due to a router that died
NO_ENTRY = (401, 403)
UNSENDABLE = "invalid_line"

OnRefused = Callable[[str], None]  # called with the reason


@dataclass(frozen=True, kw_only=True)
class Retries:
    """Limits of retries."""

    attempts: int = 5  # for a line that fails: a lost connection, a timeout, or a status in BROKEN
    patience_s: float = 600.0  # for a gateway that is unreachable or refuses requests


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """An attempt without a final answer."""

    why: str
    refused: bool  # the gateway did not start on the request
    after_s: float | None = None  # Retry-After, if any
    answer: httpx.Response | None = None
    code: str = ""


async def send_line(
    gateway: httpx.AsyncClient, line: BatchLine, retries: Retries, on_refused: OnRefused = lambda why: None
) -> dict[str, Any]:
    """Returns the output line: an answer of any status, or an error for a line that failed too often or cannot be sent.

    on_refused: called at every attempt at which the gateway is unreachable or refuses requests.
    Raises Unavailable after patience_s of refusals, and ConfigError if the gateway rejects the API key; the line is
    then not done.
    """
    if line.problem:
        return _output(line, answer=None, code=UNSENDABLE, message=f"line {line.number} was not sent: {line.problem}")
    broken, refused_since_s, pauses = 0, 0.0, 0
    while True:
        tried = await _try(gateway, line)
        if isinstance(tried, httpx.Response):
            return _output(line, answer=tried)
        now_s = time.monotonic()
        if tried.refused:
            refused_since_s = refused_since_s or now_s
            on_refused(tried.why)
        else:
            broken, refused_since_s = broken + 1, 0.0
            if broken >= retries.attempts:
                return _output(line, answer=tried.answer, code=tried.code, message=f"{broken} times: {tried.why}")
        pause_s = min(FIRST_PAUSE_S * 2**pauses, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
        pause_s, pauses = max(pause_s, tried.after_s or 0.0), min(pauses + 1, 16)
        if now_s + pause_s - (refused_since_s or now_s) > retries.patience_s:
            raise Unavailable(f"{gateway.base_url}: takes no requests for {retries.patience_s:g} s now ({tried.why})")
        await asyncio.sleep(pause_s)


async def _try(gateway: httpx.AsyncClient, line: BatchLine) -> httpx.Response | _Failure:
    try:
        answer = await gateway.post(line.url, json=line.body)
    except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
        return _Failure(why=f"cannot connect: {exc or type(exc).__name__}", refused=True)
    except httpx.TimeoutException:
        return _Failure(why="no answer in time", refused=False, code="timeout")
    except httpx.RequestError as exc:
        return _Failure(
            why=f"the connection broke: {exc or type(exc).__name__}", refused=False, code="connection_error"
        )
    why = f"{answer.status_code}: {message_of(json_of(answer.content))}"
    if answer.status_code in NO_ENTRY:
        raise ConfigError(f"{gateway.base_url}: refuses the API key ({why})")
    if answer.status_code in REFUSED + BROKEN:
        after_s = retry_after_s(answer.headers, time.time())
        return _Failure(why=why, refused=answer.status_code in REFUSED, after_s=after_s, answer=answer)
    return answer


def _output(line: BatchLine, *, answer: httpx.Response | None, code: str = "", message: str = "") -> dict[str, Any]:
    name = uuid.uuid4().hex
    response = None
    if answer is not None:
        response = {
            "status_code": answer.status_code,
            "request_id": answer.headers.get("x-request-id", f"req_{name}"),
            "body": json_of(answer.content),
        }
    return {
        "id": f"batch_req_{name}",
        "custom_id": line.custom_id,
        "response": response,
        "error": None if answer is not None else {"code": code, "message": message},
    }
