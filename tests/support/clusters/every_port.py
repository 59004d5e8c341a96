"""One of each server of the product, behind TLS or in plain text, and calls of them."""

import ssl
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx

from moecluster.config.sections import SecurityConfig
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import ModelSource
from moecluster.metrics import Metrics
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.metrics_server import MetricsServer
from moecluster.rpc.scopes import Scope
from moecluster.rpc.server import open_channel
from moecluster.rpc.tls.material import NAME
from tests.support.clusters.every_method import Method, code_of
from tests.support.clusters.guarded_servers import guarded_servers
from tests.support.clusters.running_gateway import running_gateway
from tests.support.fakes.fake_router import FakeRouter
from tests.support.waiting import WAIT_S

GRPC = ("router", "controller", "expert", "checkpoint")
HTTP = {
    "metrics": (Scope.READ, "/metrics"),
    "gateway": (Scope.INFER, "/v1/models"),
    "gateway's metrics": (Scope.READ, "/metrics"),
}
HEALTH = Method(path="/grpc.health.v1.Health/Check", requests_streamed=False)


@dataclass(frozen=True, kw_only=True)
class Ports:
    """One of each service."""

    addresses: dict[str, str]  # service -> host:port
    secret: ClusterCredentials
    tls_dir: Path | None  # None: all speak plain text
    foreign_tls_dir: Path  # of another CA

    def grpc(self, service: str, bearer: str, methods: list[Method], *, tls_dir: Path | None) -> set[grpc.StatusCode]:
        """The statuses of calls of these methods. tls_dir: the client's; None: plain text."""
        with self.channel(service, tls_dir) as channel:
            metadata = (("authorization", f"Bearer {bearer}"),) if bearer else ()
            connects = tls_dir == self.tls_dir
            return {code_of(channel, method, metadata, connects=connects)[0] for method in methods}

    def channel(self, service: str, tls_dir: Path | None) -> Any:
        credentials = replace(self.secret, tls_dir=str(tls_dir)) if tls_dir is not None else None
        channel: Any = open_channel(self.addresses[service], credentials)
        return channel._channel if credentials is not None else channel  # without the secret that it would add

    def http(self, service: str, path: str, bearer: str, *, scheme: str = "", certificate: bool = False) -> int:
        """The status of GET; certificate: with a client certificate of another CA."""
        context = ssl.create_default_context()
        if self.tls_dir is not None:
            context.load_verify_locations(self.tls_dir / "ca.crt")
        if certificate:
            context.load_cert_chain(self.foreign_tls_dir / "tls.crt", self.foreign_tls_dir / "tls.key")
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        scheme = scheme or ("http" if self.tls_dir is None else "https")
        url = f"{scheme}://{self.addresses[service]}{path}"
        with httpx.Client(verify=context, timeout=WAIT_S) as client:
            return client.get(url, headers=headers, extensions={"sni_hostname": NAME}).status_code

    def answers(self, service: str) -> bool:
        """Whether a right call of a service is answered."""
        if service in HTTP:
            return self.http(service, HTTP[service][1], self.secret.secret) == 200
        return self.grpc(service, self.secret.secret, [HEALTH], tls_dir=self.tls_dir) == {grpc.StatusCode.OK}


@contextmanager
def every_port(secret: ClusterCredentials, *, foreign_tls_dir: Path) -> Iterator[Ports]:
    """Context: all run, with TLS if the secret has a tls_dir."""
    tls_dir = Path(secret.tls_dir) if secret.tls_dir else None
    with ExitStack() as running:
        addresses = {name: server.address for name, server in running.enter_context(guarded_servers(secret)).items()}
        metrics = running.enter_context(closing(MetricsServer(Metrics(model="m"), credentials=secret)))
        router = running.enter_context(FakeRouter(credentials=secret))
        seeds = ClusterAddresses(routers=(router.address,), credentials=secret)
        source = ModelSource(name="model", cluster=secret.cluster, seeds=seeds)
        files: dict[str, Any] = {}
        if tls_dir is not None:
            files = {"tls_certificate_file": str(tls_dir / "tls.crt"), "tls_key_file": str(tls_dir / "tls.key")}
        gateway = running.enter_context(running_gateway(source, keys=["sk-team"], security=SecurityConfig(), **files))
        addresses["metrics"] = f"127.0.0.1:{metrics.port}"
        addresses["gateway"] = addresses["gateway's metrics"] = gateway.server.address
        yield Ports(addresses=addresses, secret=secret, tls_dir=tls_dir, foreign_tls_dir=foreign_tls_dir)
