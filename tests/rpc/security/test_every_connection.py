"""Ports x attempts, below the calls: bytes that are no TLS, no HTTP or nothing at all, and certificates that are not
the cluster's. No port answers, and each serves a right call afterwards."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from moecluster.cli.common.certificates import Authority
from moecluster.rpc.credentials import ClusterCredentials
from tests.support.certificates import write_certificates
from tests.support.clusters import raw_attempts
from tests.support.clusters.every_port import GRPC, Ports, every_port
from tests.support.clusters.raw_attempts import GARBAGE, HTTP2_PREFACE, HTTP_REQUEST, client_hello, end_of, held

SECRET = ClusterCredentials(secret="k" * 43, cluster="ours")
OURS, THEIRS = Authority.make(), Authority.make()
HTTP = ("metrics", "gateway")
SENT: dict[str, Callable[[], bytes]] = {
    "garbage": lambda: GARBAGE,
    "a request in plain text": lambda: HTTP_REQUEST,
    "the begin of gRPC in plain text": lambda: HTTP2_PREFACE,
    "the begin of TLS": client_hello,
}
HELD: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "half a handshake": lambda: client_hello()[:50],
    "half a request": lambda: HTTP_REQUEST[:20],
}
CERTIFICATES: dict[str, Callable[[], tuple[bytes, bytes] | None]] = {
    "none": lambda: None,
    "one of another CA": lambda: THEIRS.certify(days=1),
    "an expired one": lambda: OURS.certify(days=-1),
}


@dataclass(frozen=True, kw_only=True)
class Servers:
    """All of them twice."""

    tls: Ports
    plain: Ports


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = write_certificates(tmp_path_factory.mktemp("tls"), OURS)
    foreign = write_certificates(tmp_path_factory.mktemp("foreign"), THEIRS)
    with (
        every_port(replace(SECRET, tls_dir=str(folder)), foreign_tls_dir=foreign) as tls,
        every_port(SECRET, foreign_tls_dir=foreign) as plain,
    ):
        yield Servers(tls=tls, plain=plain)


@pytest.mark.parametrize("sent", ["garbage", "a request in plain text", "the begin of gRPC in plain text"])
@pytest.mark.parametrize("service", [*GRPC, *HTTP])
def test_a_port_with_tls_answers_nothing_else(servers: Servers, service: str, sent: str) -> None:
    assert end_of(servers.tls.addresses[service], SENT[sent]()) == "closed"
    assert servers.tls.answers(service)


@pytest.mark.parametrize("shown", CERTIFICATES)
@pytest.mark.parametrize("service", GRPC)
def test_a_grpc_port_talks_to_no_certificate_but_the_clusters(
    servers: Servers, service: str, shown: str, tmp_path: Path
) -> None:
    address = servers.tls.addresses[service]
    assert raw_attempts.tls_end_of(address, certificate=CERTIFICATES[shown](), folder=tmp_path) == "closed"
    assert raw_attempts.tls_end_of(address, certificate=OURS.certify(days=1), folder=tmp_path) == "nothing", "it waits"
    assert servers.tls.answers(service)


@pytest.mark.parametrize("sent", ["garbage", "a request in plain text", "the begin of TLS"])
@pytest.mark.parametrize("service", [*GRPC, *HTTP])
def test_a_port_without_tls_answers_no_more_than_an_error(servers: Servers, service: str, sent: str) -> None:
    over_http = "HTTP 401" if sent == "a request in plain text" else "HTTP 400"
    assert end_of(servers.plain.addresses[service], SENT[sent]()) == ("nothing" if service in GRPC else over_http)
    assert servers.plain.answers(service)


@pytest.mark.parametrize("service", [*GRPC, *HTTP])
def test_tls_to_a_port_without_it_ends_in_the_handshake(servers: Servers, service: str, tmp_path: Path) -> None:
    address = servers.plain.addresses[service]
    ended = raw_attempts.tls_end_of(address, certificate=OURS.certify(days=1), folder=tmp_path)
    assert ended == "WRONG_VERSION_NUMBER"
    assert servers.plain.answers(service)


@pytest.mark.parametrize("sent", HELD)
@pytest.mark.parametrize("kind", ["tls", "plain"])
@pytest.mark.parametrize("service", [*GRPC, *HTTP])
def test_connections_that_stop_half_way_hold_up_nobody(servers: Servers, service: str, kind: str, sent: str) -> None:
    ports: Ports = getattr(servers, kind)
    with held(ports.addresses[service], HELD[sent](), count=8):
        assert ports.answers(service)
