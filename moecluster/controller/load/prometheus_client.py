"""Instant queries to a Prometheus server by its HTTP API (v1), with strict checks of the replies.

Uses urllib: one GET with a deadline needs no more, and neither requests nor httpx is a dependency of ours.
"""

import http.client
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecluster.errors import ConfigError, DeadlineExceeded, InvalidMessage, Unavailable

MAX_ANSWER_BYTES = 128 * 2**20  # some 700,000 series
CHUNK_BYTES = 2**16
MAX_QUOTED = 200  # characters of the server's message in an error


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One series of a reply."""

    labels: Mapping[str, str]  # including __name__, if the query keeps it
    time_s: float  # Unix time at which the query was evaluated
    value: float


class PrometheusServer:
    """Sends queries to one server. Thread-safe."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        """address: http://host:port, a path prefix may follow. Raises ConfigError if it is something else."""
        if not _is_address(address):
            raise ConfigError(f"controller.prometheus_address: {address!r}, expected http://host:port")
        self.address = address.rstrip("/")
        self._timeout_s = timeout_s

    def query(self, promql: str, *, at_s: float | None = None) -> tuple[Sample, ...]:
        """Returns the instant vector of an expression, at a Unix time or now.

        Raises Unavailable if the server is unreachable or returns an error, DeadlineExceeded, or InvalidMessage for a
        reply that is not of Prometheus.
        """
        parameters = {"query": promql} if at_s is None else {"query": promql, "time": repr(at_s)}
        body = self._get(f"{self.address}/api/v1/query?{urllib.parse.urlencode(parameters)}")
        try:
            return _decode(body)
        except InvalidMessage as exc:
            raise InvalidMessage("", f"{self.address} does not answer as Prometheus does: {exc}") from exc

    def _get(self, url: str) -> bytes:
        deadline_s = time.monotonic() + self._timeout_s
        try:
            with urllib.request.urlopen(url, timeout=self._timeout_s) as response:
                return self._read(response, deadline_s)
        except urllib.error.HTTPError as exc:
            with exc:
                raise Unavailable(f"Prometheus at {self.address} refuses: {exc.code} {_reason(exc)}") from exc
        except TimeoutError as exc:
            raise self._too_late() from exc
        except urllib.error.URLError as exc:
            if isinstance(exc.reason, TimeoutError):
                raise self._too_late() from exc
            raise Unavailable(f"Prometheus at {self.address} cannot be reached: {exc.reason}") from exc
        except (OSError, http.client.HTTPException) as exc:
            raise Unavailable(f"Prometheus at {self.address} broke off: {exc!r}") from exc

    def _read(self, response: http.client.HTTPResponse, deadline_s: float) -> bytes:
        """Reads the whole body by the deadline; the socket's timeout alone would let it trickle in forever."""
        chunks: list[bytes] = []
        size = 0
        while chunk := response.read1(CHUNK_BYTES):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_ANSWER_BYTES:
                raise InvalidMessage("", f"{self.address} answers with more than {MAX_ANSWER_BYTES} bytes")
            if time.monotonic() > deadline_s:
                raise self._too_late()
        return b"".join(chunks)

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"Prometheus at {self.address} did not answer within {self._timeout_s:g} s")


def quoted(text: str) -> str:
    """Returns a PromQL string literal. PromQL uses Go's, which include JSON's if Unicode is not escaped."""
    return json.dumps(text, ensure_ascii=False)


def _is_address(address: str) -> bool:
    try:
        url = urllib.parse.urlsplit(address)
        host = (url.hostname or "").encode("idna")
        known = url.scheme in ("http", "https") and host and url.port != 0
    except ValueError:  # a port that is not a number, a malformed IPv6 address, a host that is not a valid name
        return False
    plain = address.isascii() and address.isprintable() and " " not in address
    return bool(known and plain and url.username is None and not url.query and not url.fragment)


def _reason(error: urllib.error.HTTPError) -> str:
    """Returns the server's error message, if the body has the form that the API documents."""
    try:
        return str(json.loads(error.read(CHUNK_BYTES))["error"])[:MAX_QUOTED]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return str(error.reason)


def _decode(body: bytes) -> tuple[Sample, ...]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise InvalidMessage("", f"no JSON: {body[:40]!r}") from exc
    data = _field(_object(answer, "the answer"), "data", dict)
    if answer.get("status") != "success":
        raise InvalidMessage("status", f"{str(answer.get('status'))[:40]!r}, expected success")
    if data.get("resultType") != "vector":
        raise InvalidMessage("resultType", f"{str(data.get('resultType'))[:40]!r}, expected vector")
    return tuple(_sample(_object(entry, "result")) for entry in _field(data, "result", list))


def _sample(entry: Mapping[str, Any]) -> Sample:
    labels = _field(entry, "metric", dict)
    if not all(isinstance(value, str) for value in labels.values()):
        raise InvalidMessage("metric", "a label that is no text")
    pair = _field(entry, "value", list)
    # The value comes as a string, since JSON has no NaN and no infinity.
    if len(pair) != 2 or type(pair[0]) not in (int, float) or type(pair[1]) is not str:
        raise InvalidMessage("value", f"{str(pair)[:40]}, expected [time, text]")
    try:
        value, time_s = float(pair[1]), float(pair[0])
    except (ValueError, OverflowError) as exc:
        raise InvalidMessage("value", f"{pair[1][:40]!r}, expected a number") from exc
    if not math.isfinite(time_s):
        raise InvalidMessage("value", f"at time {time_s}")
    return Sample(labels=labels, time_s=time_s, value=value)


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidMessage(name, f"{type(value).__name__}, expected an object")
    return value


def _field(value: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(value.get(name), kind):
        raise InvalidMessage(name, f"{type(value.get(name)).__name__}, expected {kind.__name__}")
    return value[name]
