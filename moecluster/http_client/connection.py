"""Connects to an OpenAI-compatible HTTP gateway: its URL, its API key, and its error answers."""

import email.utils
import ipaddress
import math
import os
from typing import Any

import httpx

from moecluster.errors import ConfigError
from moecluster.strict_json import JsonProblem, parse_json

CONNECT_TIMEOUT_S = 10.0
SHOWN_CHARACTERS = 300


def gateway_url(base_url: str) -> httpx.URL:
    """Returns the gateway's root URL, without a trailing /v1 (which OpenAI's clients expect). Raises ConfigError."""
    try:
        url = httpx.URL(base_url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as exc:
        raise ConfigError(f'--base-url: got "{base_url}", which is no URL ({exc})') from exc
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f'--base-url: got "{base_url}", expected one such as http://127.0.0.1:8000')
    return url


def read_api_key(variable: str) -> str:
    """Returns the key in an environment variable; empty if not set. Raises ConfigError, without showing the key."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"${variable}: holds characters that no API key has")
    return key


def open_gateway(
    base_url: str,
    *,
    api_key: str,
    max_connections: int,
    timeout_s: float,
    transport: httpx.AsyncBaseTransport | None = None,
) -> httpx.AsyncClient:
    """Returns a client of the gateway. timeout_s: longest silence. transport: replaces the network.

    Raises ConfigError.
    """
    url = gateway_url(base_url)
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
        limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        trust_env=not _is_loopback(url.host),  # a proxy from the environment cannot reach this host
        transport=transport,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def json_of(content: bytes) -> Any:
    """Returns an answer's body: a JSON value that can be encoded again, or the text if it is not JSON."""
    try:
        return parse_json(content)
    except JsonProblem:
        return content.decode(errors="replace")


def message_of(body: Any) -> str:
    """Returns the message of an answer in OpenAI's error format, in one line."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    line = " ".join(str(message or body).split())[:SHOWN_CHARACTERS]
    return "".join(character if character.isprintable() else "?" for character in line)


def retry_after_s(headers: httpx.Headers, now_s: float) -> float | None:
    """Returns the seconds that Retry-After asks for; None if absent or unintelligible. now_s: from time.time; the
    server's own Date goes before it, since clocks differ."""
    message = headers.get("retry-after", "").strip()
    try:
        after_s = float(message)
    except ValueError:
        until_s, said_s = _unix_s(message), _unix_s(headers.get("date", ""))
        if until_s is None:
            return None
        after_s = until_s - (now_s if said_s is None else said_s)
    return max(after_s, 0.0) if math.isfinite(after_s) else None


def _unix_s(date: str) -> float | None:
    """Returns the Unix time of an HTTP date; None if it is none."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
