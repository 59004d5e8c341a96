"""/metrics: for holders of the scope read, over TLS where the cluster has it, and for nobody else."""

import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from moecluster.cli.common.certificates import Authority
from moecluster.controller.load.prometheus_client import PrometheusServer
from moecluster.errors import ConfigError
from moecluster.metrics import Metrics
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.metrics_server import MAX_CONNECTIONS, MetricsServer
from moecluster.rpc.scopes import Scope
from moecluster.rpc.scrape_targets import ScrapeTarget
from moecluster.rpc.tokens import make_token
from tests.support.certificates import write_certificates
from tests.support.clusters.prometheus_server import SCRAPED, RunningPrometheus
from tests.support.clusters.scraped_metrics import metrics_of, scrape
from tests.support.waiting import WAIT_S, wait_until

SECRET = ClusterCredentials(secret="k" * 43)
OURS = Authority.make()


def token_of(*scopes: Scope, credentials: ClusterCredentials = SECRET, **changed: Any) -> ClusterCredentials:
    token = make_token(credentials, **{"scopes": scopes, "subject": "prometheus", "lifetime_s": 3600, **changed})
    return ClusterCredentials(token=token, tls_dir=credentials.tls_dir)


def serve(credentials: ClusterCredentials | None, **options: Any) -> MetricsServer:
    metrics = Metrics(model="m", cluster="c")
    metrics.set_generation(7)
    return MetricsServer(metrics, credentials=credentials, **options)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with closing(serve(SECRET)) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("given", [SECRET, token_of(Scope.READ), token_of(Scope.INFER, Scope.READ)])
def test_the_secret_and_a_token_to_read_are_enough(address: str, given: ClusterCredentials) -> None:
    assert 'moecluster_placement_generation{cluster="c",model="m"} 7.0' in metrics_of(address, given)


@pytest.mark.parametrize(
    ("given", "status", "why"),
    [
        (None, 401, "authorization: missing; send the header Authorization: Bearer"),
        (ClusterCredentials(secret="w" * 43), 401, "authorization: the wrong secret"),
        (token_of(Scope.READ, now_s=time.time() - 7200), 401, "the token has expired"),
        (token_of(Scope.READ, credentials=ClusterCredentials(secret="w" * 43)), 401, "of another cluster"),
        (token_of(Scope.INFER, Scope.OPERATE), 403, "requires a token with the scope read; this one has infer operate"),
    ],
)
def test_everybody_else_is_told_what_would_be_right(address: str, given, status: int, why: str) -> None:
    answer = scrape(address, given)
    assert answer.status_code == status and why in answer.text and "moecluster_placement" not in answer.text
    assert (answer.headers.get("WWW-Authenticate") == "Bearer") == (status == 401)
    if given is not None:
        assert given.bearer not in answer.text


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/metrics?name[]=x", "/../metrics", "//metrics", "/sd"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_no_path_and_no_method_goes_round_the_check(address: str, method: str, path: str) -> None:
    with closing(http.client.HTTPConnection(address, timeout=WAIT_S)) as connection:
        connection.request(method, path)
        assert connection.getresponse().status == 401


def test_the_controllers_list_takes_the_same_token_and_others_have_none(address: str) -> None:
    token = {"Authorization": f"Bearer {token_of(Scope.READ).bearer}"}
    with closing(serve(SECRET)) as server:
        server.list_targets(lambda: (ScrapeTarget(address="h:1", process="expert-0", role="expert"),))
        url = f"http://127.0.0.1:{server.port}/sd"
        found = httpx.get(url, headers=token)
        assert found.headers["Content-Type"] == "application/json"
        labels = {"__scheme__": "http", "process": "expert-0", "role": "expert"}
        assert found.json() == [{"targets": ["h:1"], "labels": labels}]
        assert httpx.get(url).status_code == 401
    assert httpx.get(f"http://{address}/sd", headers=token).status_code == 404


def test_open_metrics_are_everybodys() -> None:
    with closing(serve(SECRET, is_open=True)) as server:
        assert metrics_of(f"127.0.0.1:{server.port}")


def test_with_certificates_it_speaks_tls_alone_and_follows_them(tmp_path: Path) -> None:
    secret = ClusterCredentials(secret=SECRET.secret, tls_dir=str(write_certificates(tmp_path / "tls", OURS)))
    with closing(serve(secret)) as server:
        address = f"127.0.0.1:{server.port}"
        assert metrics_of(address, secret) and metrics_of(address, token_of(Scope.READ, credentials=secret))
        assert scrape(address, tls_dir=secret.tls_dir).status_code == 401
        with pytest.raises(httpx.HTTPError):
            scrape(address, SECRET)
        theirs = str(write_certificates(tmp_path / "theirs", Authority.make()))
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            scrape(address, ClusterCredentials(secret=SECRET.secret, tls_dir=theirs))
        before = shown_certificate(server.port)
        write_certificates(tmp_path / "tls", OURS)
        wait_until(lambda: shown_certificate(server.port) != before, "the new certificate")
        assert metrics_of(address, secret)
        (tmp_path / "tls" / "tls.key").write_bytes(b"no key")
        with pytest.raises(ConfigError, match="is no private key"):
            serve(secret)
        assert metrics_of(address, secret), "it goes on with what it has"


def shown_certificate(port: int) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port), WAIT_S)) as connected:
        return connected.getpeercert(binary_form=True) or b""


@pytest.mark.parametrize("has_tls", [False, True])
def test_connections_that_say_nothing_keep_nobody_out(tmp_path: Path, has_tls: bool) -> None:
    folder = str(write_certificates(tmp_path, OURS)) if has_tls else ""
    secret = ClusterCredentials(secret=SECRET.secret, tls_dir=folder)
    with closing(serve(secret)) as server, ExitStack() as silent:
        for _ in range(3 * MAX_CONNECTIONS):
            silent.enter_context(socket.create_connection(("127.0.0.1", server.port), WAIT_S))
        assert metrics_of(f"127.0.0.1:{server.port}", secret)


def test_prometheus_reads_it_with_a_token_and_over_tls(prometheus: RunningPrometheus) -> None:
    secret = ClusterCredentials(secret=SCRAPED.secret, tls_dir=str(prometheus.tls_dir))
    with closing(serve(secret)) as server:
        prometheus.scrape(f"127.0.0.1:{server.port}", scheme="https")
        asked = PrometheusServer(prometheus.address, timeout_s=WAIT_S)
        wait_until(lambda: [s.value for s in asked.query("moecluster_placement_generation")] == [7], "a scrape")
