"""Ports x attempts: with the wrong credential, or none, or without the right certificate, every port of every service
refuses with the documented status (docs/security.md), and with the right one it answers."""

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from moecluster.cli.common.certificates import Authority
from moecluster.config.sections import SecurityConfig
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import ModelSource
from moecluster.metrics import Metrics
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.metrics_server import MetricsServer
from moecluster.rpc.scopes import Scope, required_scope
from moecluster.rpc.server import open_channel
from moecluster.rpc.tls.material import NAME
from moecluster.rpc.tokens import make_token
from tests.support.certificates import write_certificates
from tests.support.clusters.every_method import Method, code_of, guarded_methods
from tests.support.clusters.guarded_servers import guarded_servers
from tests.support.clusters.running_gateway import running_gateway
from tests.support.fakes.fake_router import FakeRouter
from tests.support.waiting import WAIT_S

SECRET = ClusterCredentials(secret="k" * 43, cluster="ours")
ANOTHER = ClusterCredentials(secret="w" * 43, cluster="ours")
SAME_SECRET = ClusterCredentials(secret="k" * 43, cluster="another")
GRPC = ("router", "controller", "expert", "checkpoint")
HTTP = {
    "metrics": (Scope.READ, "/metrics"),
    "gateway": (Scope.INFER, "/v1/models"),
    "gateway's metrics": (Scope.READ, "/metrics"),
}
OURS, THEIRS = Authority.make(), Authority.make()


def token(credentials: ClusterCredentials, *scopes: Scope, now_s: float | None = None) -> str:
    return make_token(credentials, scopes=scopes, subject="ci", lifetime_s=3600, now_s=now_s)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A bearer for a scope, and what comes of it."""

    bearer: Callable[[Scope | None], str]
    grpc: grpc.StatusCode
    http: int


ATTEMPTS = {
    "no credential": Attempt(bearer=lambda scope: "", grpc=grpc.StatusCode.UNAUTHENTICATED, http=401),
    "a wrong secret": Attempt(bearer=lambda scope: ANOTHER.secret, grpc=grpc.StatusCode.UNAUTHENTICATED, http=401),
    "an expired token": Attempt(
        bearer=lambda scope: token(SECRET, *Scope, now_s=time.time() - 7200),
        grpc=grpc.StatusCode.UNAUTHENTICATED,
        http=401,
    ),
    "a token of another secret": Attempt(
        bearer=lambda scope: token(ANOTHER, *Scope), grpc=grpc.StatusCode.UNAUTHENTICATED, http=401
    ),
    "a token of another cluster with this secret": Attempt(
        bearer=lambda scope: token(SAME_SECRET, *Scope), grpc=grpc.StatusCode.UNAUTHENTICATED, http=401
    ),
    "a token with every other scope": Attempt(
        bearer=lambda scope: token(SECRET, *(other for other in Scope if other is not scope)),
        grpc=grpc.StatusCode.PERMISSION_DENIED,
        http=403,
    ),
}
RIGHT = {
    "the secret": lambda scope: SECRET.secret,
    "a token with the scope": lambda scope: SECRET.secret if scope is None else token(SECRET, scope),
}


@dataclass(frozen=True, kw_only=True)
class Ports:
    """One of each service, all with TLS."""

    addresses: dict[str, str]  # service -> host:port
    tls_dir: Path
    foreign_tls_dir: Path  # of another CA

    def grpc(self, service: str, bearer: str, methods: list[Method], *, tls_dir: Path | None) -> set[grpc.StatusCode]:
        """The statuses of calls of these methods. tls_dir: the client's; None: plain text."""
        with self.channel(service, tls_dir) as channel:
            metadata = (("authorization", f"Bearer {bearer}"),) if bearer else ()
            connects = tls_dir == self.tls_dir
            return {code_of(channel, method, metadata, connects=connects)[0] for method in methods}

    def channel(self, service: str, tls_dir: Path | None) -> Any:
        credentials = replace(SECRET, tls_dir=str(tls_dir)) if tls_dir is not None else None
        channel: Any = open_channel(self.addresses[service], credentials)
        return channel._channel if credentials is not None else channel  # without the secret that it would add

    def http(self, service: str, path: str, bearer: str, *, scheme: str = "https", certificate: bool = False) -> int:
        """The status of GET; certificate: with a client certificate of another CA."""
        context = ssl.create_default_context(cafile=str(self.tls_dir / "ca.crt"))
        if certificate:
            context.load_cert_chain(self.foreign_tls_dir / "tls.crt", self.foreign_tls_dir / "tls.key")
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        url = f"{scheme}://{self.addresses[service]}{path}"
        with httpx.Client(verify=context, timeout=WAIT_S) as client:
            return client.get(url, headers=headers, extensions={"sni_hostname": NAME}).status_code


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    folder = write_certificates(tmp_path_factory.mktemp("tls"), OURS)
    foreign = write_certificates(tmp_path_factory.mktemp("foreign"), THEIRS)
    secret = replace(SECRET, tls_dir=str(folder))
    with ExitStack() as running:
        addresses = {name: server.address for name, server in running.enter_context(guarded_servers(secret)).items()}
        metrics = running.enter_context(closing(MetricsServer(Metrics(model="m"), credentials=secret)))
        router = running.enter_context(FakeRouter(credentials=secret))
        seeds = ClusterAddresses(routers=(router.address,), credentials=secret)
        source = ModelSource(name="model", cluster=secret.cluster, seeds=seeds)
        files = {"tls_certificate_file": str(folder / "tls.crt"), "tls_key_file": str(folder / "tls.key")}
        gateway = running.enter_context(running_gateway(source, keys=["sk-team"], security=SecurityConfig(), **files))
        addresses["metrics"] = f"127.0.0.1:{metrics.port}"
        addresses["gateway"] = addresses["gateway's metrics"] = gateway.server.address
        yield Ports(addresses=addresses, tls_dir=folder, foreign_tls_dir=foreign)


@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize("service", GRPC)
def test_every_grpc_port_refuses(ports: Ports, service: str, attempt: str) -> None:
    tried = ATTEMPTS[attempt]
    for method in guarded_methods():
        bearer = tried.bearer(required_scope(method.path))
        assert ports.grpc(service, bearer, [method], tls_dir=ports.tls_dir) == {tried.grpc}, method.path


@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize("service", HTTP)
def test_every_http_port_refuses(ports: Ports, service: str, attempt: str) -> None:
    scope, path = HTTP[service]
    tried = ATTEMPTS[attempt]
    for certificate in (False, True):  # a client's certificate proves nothing here
        assert ports.http(service, path, tried.bearer(scope), certificate=certificate) == tried.http


@pytest.mark.parametrize("service", GRPC)
def test_without_the_right_certificate_no_grpc_port_talks(ports: Ports, service: str) -> None:
    """Even with the secret, and not even the health service."""
    unavailable = {grpc.StatusCode.UNAVAILABLE}
    methods = [guarded_methods()[0], Method(path="/grpc.health.v1.Health/Check", requests_streamed=False)]
    assert ports.grpc(service, SECRET.secret, methods, tls_dir=None) == unavailable, "plain text"
    assert ports.grpc(service, SECRET.secret, methods, tls_dir=ports.foreign_tls_dir) == unavailable, "another CA's"
    ca, foreign = (ports.tls_dir / "ca.crt").read_bytes(), ports.foreign_tls_dir
    pair = [(foreign / name).read_bytes() for name in ("tls.key", "tls.crt")]
    for shown in (grpc.ssl_channel_credentials(ca), grpc.ssl_channel_credentials(ca, *pair)):
        options = [("grpc.ssl_target_name_override", NAME)]
        with grpc.secure_channel(ports.addresses[service], shown, options=options) as channel:
            metadata = (("authorization", f"Bearer {SECRET.secret}"),)
            assert {code_of(channel, method, metadata)[0] for method in methods} == unavailable


@pytest.mark.parametrize("service", HTTP)
def test_no_http_port_talks_plain_text(ports: Ports, service: str) -> None:
    with pytest.raises(httpx.HTTPError):
        ports.http(service, HTTP[service][1], SECRET.secret, scheme="http")


@pytest.mark.parametrize("given", RIGHT)
@pytest.mark.parametrize("service", [*GRPC, *HTTP])
def test_with_the_right_credential_every_port_answers(ports: Ports, service: str, given: str) -> None:
    if service in HTTP:
        scope, path = HTTP[service]
        assert ports.http(service, path, RIGHT[given](scope)) == 200
        return
    refused = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}
    for method in guarded_methods():
        bearer = RIGHT[given](required_scope(method.path))
        assert not ports.grpc(service, bearer, [method], tls_dir=ports.tls_dir) & refused, method.path
