"""Reaching an OpenAI-compatible HTTP front: its address, its key, and what its answers say."""

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


def front_url(base_url: str) -> httpx.URL:
    """The front's root; an ending in /v1, as OpenAI's clients want it, is taken off. Raises ConfigError."""
    try:
        url = httpx.URL(base_url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as exc:
        raise ConfigError(f'--base-url: got "{base_url}", which is no URL ({exc})') from exc
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f'--base-url: got "{base_url}", expected one such as http://127.0.0.1:8000')
    return url


def read_api_key(variable: str) -> str:
    """The key in an environment variable; empty: the variable is not set. Raises ConfigError, without the key."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"${variable}: holds characters that no API key has")
    return key


def open_front(
    base_url: str,
    *,
    api_key: str,
    max_connections: int,
    timeout_s: float,
    transport: httpx.AsyncBaseTransport | None = None,
) -> httpx.AsyncClient:
    """A way to the front. timeout_s: longest silence. transport: instead of the network. Raises ConfigError."""
    url = front_url(base_url)
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
        limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        trust_env=not _is_loopback(url.host),  # a proxy does not lead to this host
        transport=transport,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def json_of(content: bytes) -> Any:
    """An answer's body: JSON that can be written again, or its text where it is none."""
    try:
        return parse_json(content)
    except JsonProblem:
        return content.decode(errors="replace")


def message_of(body: Any) -> str:
    """What an answer in OpenAI's form complains about, in one line."""
    error = body.get("error") if isinstance(body, dict) else None
    said = error.get("message") if isinstance(error, dict) else None
    line = " ".join(str(said or body).split())[:SHOWN_CHARACTERS]
    return "".join(character if character.isprintable() else "?" for character in line)


def retry_after_s(headers: httpx.Headers, now_s: float) -> float | None:
    """What Retry-After asks for, seconds or a date. None: nothing that can be understood. now_s: of time.time."""
    said = headers.get("retry-after", "").strip()
    try:
        after_s = float(said)
    except ValueError:
        try:
            after_s = email.utils.parsedate_to_datetime(said).timestamp() - now_s
        except (ValueError, TypeError):
            return None
    return max(after_s, 0.0) if math.isfinite(after_s) else None
