"""Clients that never finish a request or never read a response: others are still served at once."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import pytest

from moecluster.gateway.connections import MAX_HEAD_BYTES
from tests.support.clusters.running_gateway import RunningGateway, running_gateway
from tests.support.waiting import WAIT_S, wait_until

TEXT: dict[str, Any] = {"model": "model", "prompt": "once", "max_tokens": 1}
KEYS = ("sk-first", "sk-second")
HOLDERS = 300  # more than max_inflight, and than the bodies that may be awaited
LONG_S = 600.0  # a deadline that no test waits for


@contextmanager
def holding(gateway: RunningGateway, begin: bytes, count: int = HOLDERS) -> Iterator[list[socket.socket]]:
    """Connections that have sent these bytes and nothing more."""
    host, port = gateway.server.address.split(":")
    with ExitStack() as stack:
        held = []
        for _ in range(count):
            held.append(stack.enter_context(socket.create_connection((host, int(port)), timeout=WAIT_S)))
            held[-1].sendall(begin)
        yield held


def begun(body: bytes = b'{"model"', length: int = 10_000, key: str = KEYS[0], path: str = "/v1/completions") -> bytes:
    """The head of a request whose body never arrives."""
    lines = (f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", "Content-Type: application/json")
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode() + body


def status_of(connection: socket.socket) -> int:
    """The status of a response that ends the connection."""
    connection.settimeout(WAIT_S)
    answer = b""
    while part := connection.recv(65536):
        answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert json.loads(body)["error"]["message"] and b"connection: close" in head.lower()
    return int(head.split()[1])


def served(gateway: RunningGateway, key: str, count: int = 5) -> None:
    for _ in range(count):
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{gateway.url}/v1/completions", json=TEXT, headers=headers, timeout=WAIT_S)
        assert answer.status_code == 200, answer.text


def awaited(gateway: RunningGateway) -> int:
    return len(gateway.server.gateway.admission.awaited)


@pytest.mark.parametrize("keys", [KEYS, ()], ids=["keys", "no keys"])
def test_half_sent_bodies_of_one_client_take_nothing_from_others(router, keys) -> None:
    with running_gateway([router.address], keys=keys, body_timeout_s=LONG_S) as gateway:
        with holding(gateway, begun()) as held:
            wait_until(lambda: awaited(gateway) == 256)
            served(gateway, KEYS[1])
            assert status_of(held[0]) == 408, "the oldest is given up"
            served(gateway, KEYS[0])
            left = held[-1]  # this one still has its place
            left.sendall(b' : "model", "prompt": "x", "max_tokens": 1}'.ljust(10_000 - 8))
            assert left.recv(1000).startswith(b"HTTP/1.1 200")
        wait_until(lambda: awaited(gateway) == 0 and gateway.server.gateway.admission.body_bytes == 0)


def test_half_sent_bodies_fill_no_memory_that_others_need(router) -> None:
    half = 3000
    with running_gateway(
        [router.address], keys=KEYS, body_timeout_s=LONG_S, max_body_bytes=8192, max_buffered_bytes=10 * half
    ) as gateway, holding(gateway, begun(b" " * half), 40) as held:  # fmt: skip
        admission = gateway.server.gateway.admission
        wait_until(lambda: awaited(gateway) == 10)
        assert admission.body_bytes <= 10 * half
        served(gateway, KEYS[1])
        large = {**TEXT, "metadata": {"a": "x" * 8000}}
        headers = {"Authorization": f"Bearer {KEYS[1]}"}
        answer = httpx.post(f"{gateway.url}/v1/completions", json=large, headers=headers, timeout=WAIT_S)
        assert answer.status_code == 200 and admission.body_bytes <= 10 * half
        assert status_of(held[0]) == 408


def test_a_body_that_comes_byte_by_byte_has_the_same_time_as_any(router) -> None:
    with running_gateway([router.address], body_timeout_s=1.0) as gateway, holding(gateway, begun(), 1) as (slow,):
        deadline_s = time.monotonic() + WAIT_S
        while awaited(gateway) or not gateway.server.gateway.metrics.render().count(b'status="408"'):
            assert time.monotonic() < deadline_s, "it is waited for as long as it goes on"
            try:
                slow.sendall(b" ")
            except OSError:  # it was ended
                break
            time.sleep(0.02)
        served(gateway, "none", 1)


@pytest.mark.parametrize("begin", [b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"GE", b""])
def test_half_sent_headers_and_idle_connections_give_way(router, begin) -> None:
    with running_gateway([router.address], max_connections=50, head_timeout_s=LONG_S) as gateway:
        with holding(gateway, begin, 80) as held:
            wait_until(lambda: gateway.server.open_connections >= 50)
            served(gateway, "none")
            assert gateway.server.open_connections <= 50
            held[0].settimeout(WAIT_S)
            with suppress(ConnectionError):
                answer = held[0].recv(1000)  # empty if nothing of it was read yet
                assert not answer or answer.startswith(b"HTTP/1.1 408")
        wait_until(lambda: not gateway.server.open_connections)


def test_half_sent_headers_have_their_time_however_they_trickle(router) -> None:
    begin = b"GET /health HTTP/1.1\r\nX-Slow: "
    with running_gateway([router.address], head_timeout_s=1.0) as gateway, holding(gateway, begin, 1) as (slow,):
        slow.settimeout(0.02)
        answer, deadline_s = b"", time.monotonic() + WAIT_S
        while not answer:
            assert time.monotonic() < deadline_s
            slow.sendall(b"x")
            with suppress(TimeoutError):
                answer = slow.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET /health HTTP/1.1\r\nX-Long: ", b"x" * 4096),
        (b"GET /health HTTP/1.1\r\n", b"X-More: x\r\n" * 400),
        (b"GET /", b"x" * 4096),
        (b"POST /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Trailer: x\r\n" * 400),
        (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x" * 4096),
    ],
    ids=["header", "headers", "path", "trailers", "extension"],
)
def test_headers_without_end_are_not_kept(router, begin, more) -> None:
    with (
        running_gateway([router.address], head_timeout_s=LONG_S, body_timeout_s=LONG_S) as gateway,
        holding(gateway, begin, 1) as (endless,),
    ):
        sent = 0
        with suppress(OSError):  # it was ended
            while sent < 400 * MAX_HEAD_BYTES:
                endless.sendall(more)
                sent += len(more)
        assert sent < 400 * MAX_HEAD_BYTES
        wait_until(lambda: not gateway.server.open_connections)


def test_a_client_that_never_reads_is_ended(router) -> None:
    with running_gateway([router.address], send_timeout_s=0.5) as gateway:
        lots = {**TEXT, "max_tokens": 4000, "n": 8, "stream": True, "logprobs": 20}
        body = json.dumps(lots).encode()
        begin = begun(body, len(body))
        host, port = gateway.server.address.split(":")
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((host, int(port)))
            deaf.sendall(begin)
            wait_until(lambda: len(router.running) > 0)
            wait_until(lambda: not gateway.server.open_connections and not router.running)
        wait_until(lambda: gateway.server.gateway.admission.requests == 0)


def test_requests_behind_each_other_are_few(router) -> None:
    with running_gateway([router.address]) as gateway, holding(gateway, b"", 1) as (hasty,):
        ask = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        hasty.sendall(ask * 8)
        answer = b""
        while answer.count(b"HTTP/1.1 200") < 8:
            answer += hasty.recv(65536)
        hasty.sendall(ask * 5000)
        with suppress(ConnectionError):
            while part := hasty.recv(65536):
                answer += part
        assert answer.count(b"HTTP/1.1 200") < 100
