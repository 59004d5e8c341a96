"""One line of a batch, sent until there is an answer that stands."""

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
REFUSED = (429, 503)  # says nothing of the line: there is no room, or nobody to serve it
BROKEN = (408, 500, 502, 504)  # may be the line's fault, and may be a router's that died
NO_ENTRY = (401, 403)
UNSENDABLE = "invalid_line"

OnRefused = Callable[[str], None]  # told why


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How long to try."""

    attempts: int = 5  # for a line that breaks: a lost connection, no answer in time, a 5xx
    patience_s: float = 600.0  # for a front that is away or takes no requests


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """An attempt without an answer that stands."""

    why: str
    refused: bool  # the front did not begin with it
    after_s: float | None = None  # as the front asked for
    answer: httpx.Response | None = None
    code: str = ""


async def send_line(
    front: httpx.AsyncClient, line: BatchLine, retries: Retries, on_refused: OnRefused = lambda why: None
) -> dict[str, Any]:
    """The line of the output: an answer, whatever its status, or an error for a line that broke too many times, or
    that cannot be sent.

    on_refused: told at once, and at each further try, that the front is away or takes no requests.
    Raises Unavailable when patience with the front is over, and ConfigError if it knows no such key; the line is not
    done then.
    """
    if line.problem:
        return _output(line, answer=None, code=UNSENDABLE, message=f"line {line.number} was not sent: {line.problem}")
    broken, refused_since_s, pauses = 0, 0.0, 0
    while True:
        tried = await _try(front, line)
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
            raise Unavailable(f"{front.base_url}: takes no requests for {retries.patience_s:g} s now ({tried.why})")
        await asyncio.sleep(pause_s)


async def _try(front: httpx.AsyncClient, line: BatchLine) -> httpx.Response | _Failure:
    try:
        answer = await front.post(line.url, json=line.body)
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
        raise ConfigError(f"{front.base_url}: refuses the API key ({why})")
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
