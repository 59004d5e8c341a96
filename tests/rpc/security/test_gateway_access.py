"""The gateway: keys, tokens of its clusters, its own user, TLS that rotates, rates."""

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from moecluster.cli.common.certificates import Authority
from moecluster.config.sections import SecurityConfig
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import ModelSource
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.scopes import Scope
from moecluster.rpc.tokens import make_token
from tests.support.certificates import write_certificates
from tests.support.clusters.other_user import needs_root, request_as_another_user
from tests.support.clusters.running_gateway import RunningGateway, running_gateway
from tests.support.fakes.fake_router import FakeRouter
from tests.support.waiting import WAIT_S, wait_until

ONE = ClusterCredentials(secret="1" * 43, cluster="one")
TWO = ClusterCredentials(secret="2" * 43, cluster="two")
OURS = Authority.make()
BODY = {"model": "one", "prompt": "a", "max_tokens": 2}
COMPLETIONS = "/v1/completions"
JSON_TYPE = {"Content-Type": "application/json"}


def bearer(credentials: ClusterCredentials, *scopes: Scope) -> dict[str, str]:
    token = make_token(credentials, scopes=scopes, subject="ci", lifetime_s=3600)
    return {"Authorization": f"Bearer {token}"}


def source(name: str, router: FakeRouter, credentials: ClusterCredentials) -> ModelSource:
    seeds = ClusterAddresses(routers=(router.address,), credentials=credentials)
    return ModelSource(name=name, cluster=name, seeds=seeds)


@pytest.fixture(scope="module")
def sources() -> Iterator[tuple[ModelSource, ModelSource]]:
    """Two clusters with secrets of their own."""
    with FakeRouter("one", credentials=ONE) as first, FakeRouter("two", credentials=TWO) as second:
        yield source("one", first, ONE), source("two", second, TWO)


@pytest.fixture(scope="module")
def gateway(sources) -> Iterator[RunningGateway]:
    """A gateway to both, with an API key."""
    with running_gateway(*sources, keys=["sk-team"], security=SecurityConfig()) as serving:
        yield serving


def ask(gateway: RunningGateway, headers: dict[str, str], model: str = "one", **options: Any) -> httpx.Response:
    return httpx.post(f"{gateway.url}{COMPLETIONS}", json={**BODY, "model": model}, headers=headers, **options)


def test_a_token_opens_the_models_of_its_cluster_alone(gateway: RunningGateway) -> None:
    token = bearer(ONE, Scope.INFER)
    assert ask(gateway, token).status_code == 200
    refused = ask(gateway, token, model="two")
    assert refused.status_code == 403 and "of another cluster than the model `two`" in refused.text
    listed = httpx.get(f"{gateway.url}/v1/models", headers=token).json()["data"]
    assert [model["id"] for model in listed] == ["one"]
    assert httpx.get(f"{gateway.url}/v1/models/one", headers=token).status_code == 200
    assert httpx.get(f"{gateway.url}/v1/models/two", headers=token).status_code == 403
    by_key = {"Authorization": "Bearer sk-team"}
    assert {ask(gateway, by_key, model=name).status_code for name in ("one", "two")} == {200}


def test_metrics_take_a_token_to_read(gateway: RunningGateway) -> None:
    url = f"{gateway.url}/metrics"
    assert "moecluster_gateway_requests_total" in httpx.get(url, headers=bearer(TWO, Scope.READ)).text
    for headers, status in (({}, 401), (bearer(ONE, Scope.INFER), 403), ({"Authorization": "Bearer sk-team"}, 401)):
        assert httpx.get(url, headers=headers).status_code == status
    for path in ("//metrics", "/metrics/", "/%6Detrics", "/v1/../metrics", "/METRICS"):
        assert "moecluster_gateway_requests_total" not in httpx.get(f"{gateway.url}{path}").text


@needs_root
def test_without_keys_other_users_of_the_host_need_a_token(sources) -> None:
    body = '{"model": "one", "prompt": "a", "max_tokens": 2}'
    with running_gateway(*sources, security=SecurityConfig()) as gateway:
        address = gateway.server.address
        assert ask(gateway, {}).status_code == ask(gateway, {"Authorization": "Bearer none"}).status_code == 200
        for headers in ({}, {"Authorization": "Bearer none"}):
            status, text = request_as_another_user(
                address, "POST", COMPLETIONS, body=body, headers={**JSON_TYPE, **headers}
            )
            assert status == 401 and "moecluster token" in text
        given = {**JSON_TYPE, **bearer(ONE, Scope.INFER)}
        assert request_as_another_user(address, "POST", COMPLETIONS, body=body, headers=given)[0] == 200
        assert request_as_another_user(address, "GET", "/metrics")[0] == 401
        assert request_as_another_user(address, "GET", "/health")[0] == 200
        for forwarded in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"):
            assert ask(gateway, {forwarded: "203.0.113.7"}).status_code == 401, "a proxy speaks for others"
    with running_gateway(*sources, security=SecurityConfig(allow_without_keys=True)) as gateway:
        address = gateway.server.address
        assert request_as_another_user(address, "POST", COMPLETIONS, body=body, headers=JSON_TYPE)[0] == 200


def test_each_key_and_each_address_has_its_own_rate(sources) -> None:
    with running_gateway(*sources, keys=["sk-a", "sk-b"], max_requests_per_minute=2) as gateway:
        a, b = ({"Authorization": f"Bearer sk-{name}"} for name in "ab")
        assert [ask(gateway, a).status_code for _ in range(3)] == [200, 200, 429]
        limited = ask(gateway, a)
        assert 1 <= int(limited.headers["Retry-After"]) <= 30
        assert limited.json()["error"]["code"] == "rate_limit_exceeded"
        assert ask(gateway, b).status_code == 200
        assert [ask(gateway, bearer(ONE, Scope.INFER)).status_code for _ in range(3)] == [200, 200, 429]
        assert httpx.get(f"{gateway.url}/health").status_code == 200


def shown_certificate(address: str) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, _, port = address.rpartition(":")
    with context.wrap_socket(socket.create_connection((host, int(port)), WAIT_S)) as connected:
        return connected.getpeercert(binary_form=True) or b""


def test_it_speaks_tls_and_takes_new_certificates_while_streams_run(sources, tmp_path: Path) -> None:
    folder = write_certificates(tmp_path, OURS)
    files: dict[str, Any] = {"tls_certificate_file": str(folder / "tls.crt"), "tls_key_file": str(folder / "tls.key")}
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    context.check_hostname = False
    with (
        running_gateway(*sources, keys=["sk-team"], **files) as gateway,
        httpx.Client(verify=context, timeout=WAIT_S, headers={"Authorization": "Bearer sk-team"}) as client,
    ):
        assert gateway.url.startswith("https://")
        assert client.post(f"{gateway.url}{COMPLETIONS}", json=BODY).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{gateway.server.address}/health", timeout=WAIT_S)
        before = shown_certificate(gateway.server.address)
        with client.stream("POST", f"{gateway.url}{COMPLETIONS}", json={**BODY, "stream": True}) as stream:
            write_certificates(folder, OURS)
            wait_until(lambda: shown_certificate(gateway.server.address) != before, "the new certificate")
            assert "[DONE]" in "".join(stream.iter_text())
        assert client.get(f"{gateway.url}/health").status_code == 200
        foreign = ssl.create_default_context()
        foreign.check_hostname = False
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{gateway.url}/health", verify=foreign)
