"""Another user of the host, against a cluster with the defaults of one host: no certificates, no keys, the loopback."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from moecluster.cli.common.certificates import Authority
from moecluster.config.sections import SecurityConfig
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import ModelSource
from moecluster.metrics import Metrics
from moecluster.rpc.credentials import ClusterCredentials, secret_path, write_secret
from moecluster.rpc.metrics_server import MetricsServer
from tests.support.certificates import write_certificates
from tests.support.clusters.every_method import guarded_methods, health_methods
from tests.support.clusters.guarded_servers import guarded_servers
from tests.support.clusters.other_user import needs_root
from tests.support.clusters.running_gateway import running_gateway
from tests.support.clusters.second_user import PAGES, SECRETS, try_everything
from tests.support.fakes.fake_router import FakeRouter


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own ones are closed."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@needs_root
def test_another_user_is_refused_every_port_and_every_file(open_folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(open_folder / "state"))
    secret = ClusterCredentials.make()
    write_secret(secret_path("moecluster"), secret)
    tls_dir = write_certificates(open_folder / "tls", Authority.make())
    everybodys = open_folder / "everybodys"
    everybodys.touch(mode=0o644)
    paths = [secret_path("moecluster"), secret_path("moecluster").parent, tls_dir / "tls.key"]
    paths += [Path(f"/proc/{os.getpid()}/{name}") for name in ("fd", "mem", "environ", "maps")]
    with ExitStack() as running:
        servers = running.enter_context(guarded_servers(secret))
        metrics = running.enter_context(closing(MetricsServer(Metrics(model="m"), credentials=secret)))
        router = running.enter_context(FakeRouter(credentials=secret))
        seeds = ClusterAddresses(routers=(router.address,), credentials=secret)
        source = ModelSource(name="model", cluster="moecluster", seeds=seeds)
        gateway = running.enter_context(running_gateway(source, security=SecurityConfig()))
        by_grpc = {server.address.rpartition(":")[2] for server in servers.values()}
        by_http = {str(metrics.port), gateway.server.address.rpartition(":")[2]}
        outcomes = try_everything(map(int, by_grpc | by_http), [*paths, everybodys], has_ray=False)

    assert outcomes.files.pop(str(everybodys)) == "allowed", "it can try"
    assert set(outcomes.files.values()) == {"refused"}, outcomes.files
    health = {method.path for method in health_methods()}
    for port in by_grpc:
        calls = outcomes.calls[port]
        assert len(calls) == len(SECRETS) * (len(guarded_methods()) + len(health))
        for attempt, status in calls.items():
            expected = {"OK", "UNIMPLEMENTED"} if attempt.rpartition(" ")[2] in health else {"UNAUTHENTICATED"}
            assert status in expected, (port, attempt, status)
    for port in by_http:
        assert not outcomes.calls[port]
        assert list(outcomes.pages[port].values()) == [401] * len(SECRETS) * len(PAGES), outcomes.pages[port]
