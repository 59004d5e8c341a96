"""No free file descriptor in the process of every server: calls on open connections go on, new connections wait or are
refused, nothing spins, and once there are descriptors again all is as before."""

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moecluster.cli.common.certificates import Authority
from moecluster.client import Client
from moecluster.metrics import Metrics
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.metrics_server import MetricsServer
from moecluster.rpc.server import open_channel
from moecluster.rpc.tls.https import HttpsCertificate
from moecluster.rpc.tls.material import NAME, FollowedMaterial, TlsFiles
from tests.support.certificates import write_certificates
from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.exhaustion.descriptors import no_descriptors
from tests.support.exhaustion.every_server import GRPC, HTTP, NEW_TOKENS, PROMPT, Child, every_server
from tests.support.waiting import WAIT_S, wait_until

SHORT_S = 2.0  # after which a new connection counts as not answered
IDLE_S = 2.0  # over which the processor time of an idle process is measured
MAX_BUSY = 0.6  # of one core; a thread that spins takes a whole one
OURS = Authority.make()
MODELS = {"gateway": "/v1/models", "https gateway": "/v1/models"}


@pytest.fixture(scope="module")
def tls_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificates(tmp_path_factory.mktemp("tls"), OURS)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory, tls_dir: Path) -> Iterator[Child]:
    with every_server(save_tiny_model(tmp_path_factory.mktemp("model")), tls_dir) as running:
        yield running


def opened(service: str, address: str, tls_dir: Path, timeout_s: float, stack: ExitStack) -> Callable[[], bool]:
    """Returns a call that tells whether a server answers; all calls on the same connection, made by the first."""
    if service in GRPC:
        stub: Any = health_pb2_grpc.HealthStub(stack.enter_context(open_channel(address)))
        request = health_pb2.HealthCheckRequest()

        def check() -> bool:
            try:
                return bool(stub.Check(request, timeout=timeout_s, wait_for_ready=True).status)
            except grpc.RpcError:
                return False

        return check
    context = ssl.create_default_context(cafile=str(tls_dir / "ca.crt"))
    client = stack.enter_context(httpx.Client(verify=context, timeout=timeout_s))
    url = f"{'https' if 'https' in service else 'http'}://{address}{MODELS.get(service, '/metrics')}"

    def get() -> bool:
        try:
            return client.get(url, extensions={"sni_hostname": NAME}).status_code == 200
        except httpx.HTTPError:
            return False

    return get


def answers(child: Child, tls_dir: Path, timeout_s: float) -> dict[str, bool]:
    """Whether each server answers a new connection. All are asked at once."""
    services = (*GRPC, *HTTP)
    with ExitStack() as stack, ThreadPoolExecutor(len(services)) as pool:
        calls = [opened(service, child.addresses[service], tls_dir, timeout_s, stack) for service in services]
        return dict(zip(services, pool.map(lambda call: call(), calls), strict=True))


def busy(child: Child) -> float:
    """The share of one core that the process takes."""
    process = psutil.Process(child.process.pid)
    before, began_s = process.cpu_times(), time.monotonic()
    time.sleep(IDLE_S)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / (time.monotonic() - began_s)


def test_every_server_outlives_the_lack_of_descriptors(child: Child, tls_dir: Path) -> None:
    everyone = dict.fromkeys((*GRPC, *HTTP), True)
    assert answers(child, tls_dir, WAIT_S) == everyone
    with ExitStack() as stack:
        keeping = [s for s in everyone if "metrics" not in s]  # /metrics closes a connection after its answer
        kept = {s: opened(s, child.addresses[s], tls_dir, WAIT_S, stack) for s in keeping}
        client = stack.enter_context(Client(child.addresses["router"]))
        assert all(call() for call in kept.values())
        expected, threads = child.tell("generate"), child.tell("threads")
        chunks = iter(client.generate(PROMPT, max_new_tokens=NEW_TOKENS))
        first = next(chunks).text
        child.tell("exhaust")
        assert first + "".join(chunk.text for chunk in chunks) == expected, "a request under way"
        assert client.generate(PROMPT, max_new_tokens=NEW_TOKENS).text() == expected == child.tell("generate")
        assert {s for s, call in kept.items() if not call()} == set(), "connections made before"
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(answers, child, tls_dir, SHORT_S + IDLE_S)
            share = busy(child)
            assert not all(asked.result().values()), "new connections wait for a descriptor that is closed"
        assert share < MAX_BUSY and busy(child) < MAX_BUSY, "no thread spins"
        assert child.tell("generate") == expected
        child.tell("free")
        assert answers(child, tls_dir, WAIT_S) == everyone
        assert all(call() for call in kept.values())
        assert child.tell("generate") == expected
        wait_until(lambda: set(threads) <= set(child.tell("threads")), "every thread that was there")


def test_certificates_that_change_meanwhile_are_read_afterwards(tmp_path: Path) -> None:
    files = TlsFiles.in_folder(write_certificates(tmp_path, OURS))
    now_s = 0.0
    followed = FollowedMaterial(files, clock=lambda: now_s)
    https = HttpsCertificate(files)
    first, context = followed.current(), https.context()
    write_certificates(tmp_path, OURS)
    with no_descriptors():
        now_s = 2.0
        assert followed.current() is first
        time.sleep(1.1)  # it looks at the files once a second
        assert https.context() is context
    now_s = 4.0
    assert followed.current().certificate == (tmp_path / "tls.crt").read_bytes() != first.certificate
    wait_until(lambda: https.context() is not context, "the new certificate")


def test_a_metrics_server_that_could_not_accept_can_be_closed(tls_dir: Path) -> None:
    secret = ClusterCredentials(secret="k" * 43, tls_dir=str(tls_dir))
    with closing(MetricsServer(Metrics(model="m"), credentials=secret)) as server:
        waiting = socket.socket()
        with closing(waiting), no_descriptors():
            waiting.connect(("127.0.0.1", server.port))
            server.close()
