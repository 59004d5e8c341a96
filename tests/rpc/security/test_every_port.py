"""Ports x attempts: with the wrong credential, or none, or without the right certificate, every port of every service
refuses with the documented status (docs/security.md), and with the right one it answers."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import grpc
import httpx
import pytest

from moecluster.cli.common.certificates import Authority
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.scopes import Scope, required_scope
from moecluster.rpc.tls.material import NAME
from moecluster.rpc.tokens import make_token
from tests.support.certificates import write_certificates
from tests.support.clusters.every_method import Method, code_of, guarded_methods
from tests.support.clusters.every_port import GRPC, HTTP, Ports, every_port

SECRET = ClusterCredentials(secret="k" * 43, cluster="ours")
ANOTHER = ClusterCredentials(secret="w" * 43, cluster="ours")
SAME_SECRET = ClusterCredentials(secret="k" * 43, cluster="another")
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


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    """All with TLS."""
    folder = write_certificates(tmp_path_factory.mktemp("tls"), OURS)
    foreign = write_certificates(tmp_path_factory.mktemp("foreign"), THEIRS)
    with every_port(replace(SECRET, tls_dir=str(folder)), foreign_tls_dir=foreign) as running:
        yield running


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
    assert ports.tls_dir is not None
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
