"""A token allows exactly the methods of its scopes, at every server of its cluster."""

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moecluster.client import AsyncClient, Client
from moecluster.errors import ConfigError, MissingScope, Unauthenticated
from moecluster.rpc.authentication import MAX_ANONYMOUS_CALLS
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.controller.server import serve_controller
from moecluster.rpc.credentials import ClusterCredentials, write_secret
from moecluster.rpc.router.server import serve_router
from moecluster.rpc.scopes import Scope, required_scopes
from moecluster.rpc.server import RunningServer, open_channel
from moecluster.rpc.tokens import make_token
from tests.support.clusters.every_method import code_of, guarded_methods
from tests.support.clusters.guarded_servers import guarded_servers
from tests.support.fakes.fake_controller import FakeController
from tests.support.fakes.fake_router import FakeRouter

SECRET = ClusterCredentials(secret="k" * 43)
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def token_of(*scopes: Scope, **changed: Any) -> ClusterCredentials:
    return ClusterCredentials(
        token=make_token(SECRET, **{"scopes": scopes, "subject": "ci", "lifetime_s": 3600, **changed})
    )


@pytest.fixture(scope="module")
def guarded() -> Iterator[dict[str, RunningServer]]:
    with guarded_servers(SECRET) as servers:
        yield servers


@pytest.mark.parametrize("scope", Scope)
def test_a_token_reaches_the_methods_of_its_scope_and_no_other(guarded, scope: Scope) -> None:
    needed = required_scopes()
    for server in guarded.values():
        with open_channel(server.address, token_of(scope)) as channel:
            for method in guarded_methods():
                code, detail = code_of(channel, method)
                if needed[method.path] is scope:
                    assert code not in REFUSED, (method.path, code, detail)
                    continue
                assert code is grpc.StatusCode.PERMISSION_DENIED, (method.path, code, detail)
                other = needed[method.path]
                words = f"requires a token with the scope {other}; this one has {scope}" if other else "secret alone"
                assert words in detail and "\n" not in detail, detail


def test_a_token_with_several_scopes_does_what_each_of_them_allows(guarded) -> None:
    with open_channel(guarded["controller"].address, token_of(*Scope)) as channel:
        for method in guarded_methods():
            refused = code_of(channel, method)[0] in REFUSED
            assert refused == (required_scopes()[method.path] is None), method.path


def test_an_expired_token_is_told_so(guarded) -> None:
    expired = token_of(Scope.INFER, now_s=time.time() - 7200)
    with (
        Client(guarded["router"].address, credentials=expired) as client,
        pytest.raises(Unauthenticated, match="authorization: the token has expired; send the metadata") as caught,
    ):
        client.generate("a").text()
    assert expired.token not in str(caught.value)


def test_clients_take_a_token_wherever_they_take_the_secret(tmp_path: Path) -> None:
    file = tmp_path / "own" / "ci.token"
    with FakeRouter(credentials=SECRET) as router:
        write_secret(file, token_of(Scope.INFER))
        with Client(router.address, secret_file=file) as client:
            assert client.generate("a").text()

        async def ask() -> str:
            async with AsyncClient(router.address, secret_file=file) as client:
                return await client.generate("a").text()

        assert asyncio.run(ask())
        write_secret(file, token_of(Scope.READ))
        with (
            Client(router.address, secret_file=file) as client,
            pytest.raises(MissingScope, match=r"RouterService\.Generate requires a token with the scope infer"),
        ):
            client.generate("a").text()


def test_who_operates_is_logged_and_with_what_is_not(caplog: pytest.LogCaptureFixture) -> None:
    server = serve_controller(FakeController(), credentials=SECRET)
    given = token_of(Scope.OPERATE, Scope.READ, subject="night-shift@ops")
    try:
        with caplog.at_level(logging.DEBUG), ControllerCalls(server.address, credentials=given) as calls:
            calls.status()
            calls.scale_routers(2)
    finally:
        server.stop(0.0)
    assert [r.message for r in caplog.records if "night-shift@ops" in r.message] == [
        "night-shift@ops called /moecluster.v1.ControllerService/Scale"
    ]
    assert given.token not in caplog.text and SECRET.secret not in caplog.text


def test_health_with_a_token_is_not_counted_with_the_anonymous(guarded) -> None:
    with open_channel(guarded["router"].address, token_of(Scope.READ)) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2 * MAX_ANONYMOUS_CALLS)]
        assert {next(watch).status for watch in watches} == {health_pb2.HealthCheckResponse.SERVING}
        for watch in watches:
            watch.cancel()


def test_no_server_starts_with_a_token_in_place_of_the_secret() -> None:
    with pytest.raises(ConfigError, match="needs the cluster's secret itself"):
        serve_router(FakeRouter(), credentials=token_of(Scope.INFER))
