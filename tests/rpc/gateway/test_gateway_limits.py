"""Admission limits: keys, sizes, capacity, clients that disconnect, and the gateway's shutdown."""

import asyncio
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from moecluster.config.sections import SecurityConfig, ServeConfig
from moecluster.errors import ConfigError, ResourceError
from moecluster.gateway.api_keys import ApiKeys
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import GatewayServer, ModelSource
from tests.support.clusters.running_gateway import RunningGateway, running_gateway
from tests.support.fakes.fake_router import FakeRouter, words
from tests.support.waiting import wait_until

TEXT: dict[str, Any] = {"model": "model", "prompt": "once", "max_tokens": 200}
KEYS = ("sk-first", "sk-second")
MAX_BODY = 4096
FREED_WITHIN_S = 1.0


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with FakeRouter() as serving:
        yield serving


@pytest.fixture
def gateway(router: FakeRouter) -> Iterator[RunningGateway]:
    with running_gateway(
        [router.address], keys=KEYS, max_body_bytes=MAX_BODY, max_buffered_bytes=3 * MAX_BODY, max_inflight=4,
        body_timeout_s=2.0,
    ) as serving:  # fmt: skip
        yield serving


def post(gateway: RunningGateway, body: Any, key: str = KEYS[0], **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    content = body if isinstance(body, bytes) or hasattr(body, "__next__") else json.dumps(body)
    return httpx.post(f"{gateway.url}/v1/completions", content=content, headers=headers, timeout=20.0, **options)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
    return error


def test_only_keys_are_let_in(gateway, router) -> None:
    for key in KEYS:
        assert post(gateway, {**TEXT, "max_tokens": 1}, key).status_code == 200
    for headers in ({}, {"Authorization": "Bearer sk-third"}, {"Authorization": KEYS[0]}, {"Authorization": "Bearer"}):
        for method, path in (("POST", "completions"), ("POST", "chat/completions"), ("GET", "models")):
            refused = httpx.request(method, f"{gateway.url}/v1/{path}", headers=headers, json=TEXT)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert error_of(refused)["code"] == "invalid_api_key"
            assert "sk-" not in refused.text
    with pytest.raises(openai.AuthenticationError), gateway.openai("sk-third") as client:
        client.models.list()
    with gateway.openai(KEYS[1]) as client:
        assert client.models.list().data
    assert httpx.get(f"{gateway.url}/health").status_code == 200
    assert len(router.requests) == 2


def test_a_body_that_is_too_large_is_refused_however_it_is_sent(gateway) -> None:
    large = json.dumps({**TEXT, "prompt": "x" * MAX_BODY}).encode()
    chunks = (large[i : i + 500] for i in range(0, len(large), 500))
    for body in (large, chunks):  # the second one does not announce its size
        refused = post(gateway, body)
        assert refused.status_code == 413 and error_of(refused)["code"] == "request_too_large"
    assert post(gateway, {**TEXT, "max_tokens": 1, "prompt": "x" * (MAX_BODY - 200)}).status_code == 200
    wait_until(lambda: gateway.server.gateway.admission.body_bytes == 0)


def test_a_giant_is_refused_before_it_is_read(gateway) -> None:
    connection = http.client.HTTPConnection(gateway.server.address, timeout=10)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Authorization", f"Bearer {KEYS[0]}")
    connection.putheader("Content-Length", str(10**15))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "request_too_large"
    connection.close()


def test_a_body_that_does_not_come_is_not_waited_for(gateway) -> None:
    connection = http.client.HTTPConnection(gateway.server.address, timeout=10)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Authorization", f"Bearer {KEYS[0]}")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b'{"model"')
    assert connection.getresponse().status == 408
    connection.close()
    wait_until(lambda: len(gateway.server.gateway.admission.awaited) == 0)


def test_beyond_what_is_let_in_flight_it_is_said_when_to_try_again(gateway, router) -> None:
    router.hold.clear()
    with ThreadPoolExecutor(8) as pool:
        held = [pool.submit(post, gateway, {**TEXT, "max_tokens": 1}) for _ in range(4)]
        wait_until(lambda: len(router.running) == 4)
        for body in (TEXT, b"not read"):
            refused = post(gateway, body)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert error_of(refused)["code"] == "rate_limit_exceeded"
        router.hold.set()
        assert [answer.result().status_code for answer in held] == [200] * 4
    assert post(gateway, {**TEXT, "n": 5}).status_code == 400, "it could never be taken"
    router.hold.clear()
    with ThreadPoolExecutor(8) as pool:
        several = pool.submit(post, gateway, {**TEXT, "max_tokens": 1, "n": 3})
        wait_until(lambda: len(router.running) == 3)
        assert post(gateway, {**TEXT, "n": 2, "max_tokens": 1}).status_code == 429
        router.hold.set()
        assert several.result().status_code == 200
    assert post(gateway, {**TEXT, "n": 4, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("held", [True, False], ids=["waits", "writes"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_leaves_frees_its_place(gateway, router, stream, held, n) -> None:
    router.pace_s, router.free_tokens = 0.02, 2
    if held:
        router.hold.clear()

    async def leave() -> None:
        async with gateway.async_openai(KEYS[0]) as client:
            asking = asyncio.ensure_future(client.completions.create(**TEXT, stream=stream, n=n))
            while len(router.running) < n:
                await asyncio.sleep(0.01)
            if stream:
                await anext(aiter(await asking))
                await asking.result().close()
            else:
                await asyncio.sleep(0.1)
                asking.cancel()

    asyncio.run(leave())
    left_s = time.monotonic()
    wait_until(lambda: not router.running)
    assert time.monotonic() - left_s < FREED_WITHIN_S
    admission = gateway.server.gateway.admission
    wait_until(lambda: (admission.requests, admission.generations, admission.body_bytes) == (0, 0, 0))
    shown = httpx.get(f"{gateway.url}/metrics").text
    assert 'moecluster_gateway_requests_in_flight{cluster="cluster",model="model"} 1.0' in shown, "the one that asks"


def test_a_client_that_breaks_off_amid_its_body_leaves_nothing(gateway) -> None:
    host, port = gateway.server.address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        lines = ("POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEYS[0]}", "Content-Length: 99")
        connection.sendall("\r\n".join([*lines, "", "{"]).encode())
        wait_until(lambda: gateway.server.gateway.admission.body_bytes == 1)
    wait_until(lambda: gateway.server.gateway.admission.body_bytes == 0)


def test_an_asked_end_lets_begun_streams_end(router) -> None:
    router.pace_s = 0.02
    with running_gateway([router.address], grace_s=10.0) as gateway, gateway.openai() as client:
        stream = client.completions.create(**{**TEXT, "max_tokens": 40}, seed=1, stream=True)
        text = next(iter(stream)).choices[0].text
        gateway.server.stop()

        def refuses() -> bool:
            try:
                return httpx.get(f"{gateway.url}/health").status_code == 0
            except httpx.TransportError:
                return True

        wait_until(refuses)
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert len(text.split()) == 40 and text in words([i % 13 for i in range(80)])


def test_an_end_waits_no_longer_than_its_grace(router) -> None:
    router.free_tokens = 1
    router.hold.clear()
    with running_gateway([router.address], grace_s=1.0) as gateway, gateway.openai() as client:
        stream = client.completions.create(**TEXT, stream=True)
        next(iter(stream))
        begun_s = time.monotonic()
    assert time.monotonic() - begun_s < 8.0
    wait_until(lambda: not router.running)


def test_a_port_in_use_and_a_name_given_twice_are_said() -> None:
    source = ModelSource(name="m", seeds=ClusterAddresses(routers=("127.0.0.1:1",)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServeConfig(port=taken.getsockname()[1])
        with pytest.raises(ResourceError, match="cannot listen on"):
            GatewayServer(settings, SecurityConfig(), ApiKeys())
    with pytest.raises(ConfigError, match="given twice"):
        GatewayServer(ServeConfig(port=0), SecurityConfig(), ApiKeys()).run([source, source])


def test_the_gateway_brings_neither_torch_nor_ray_nor_transformers() -> None:
    heavy = "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    for module in ("moecluster.gateway.server", "moecluster.cli.commands.serve"):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys, {module}; {heavy}"], capture_output=True, text=True, timeout=60
        )
        assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_many_clients_at_once_are_all_served(router) -> None:
    with running_gateway([router.address]) as gateway:
        answers: list[int] = []

        def ask() -> None:
            for _ in range(10):
                answers.append(post(gateway, {**TEXT, "max_tokens": 3}).status_code)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
        assert answers == [200] * 80
