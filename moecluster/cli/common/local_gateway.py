"""Runs an HTTP gateway in this process, for a command that needs one only while it runs."""

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from actors.launch import credentials_of
from moecluster.cli.common.cluster_choice import RemoteCluster, at_address, routers_in
from moecluster.cli.common.lookup import found
from moecluster.cli.common.routers import find_routers
from moecluster.config.sections import ServeConfig
from moecluster.errors import ResourceError
from moecluster.gateway.api_keys import ApiKeys
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import GatewayServer, ModelSource

START_TIMEOUT_S = 30.0
GRACE_S = 1.0  # the command's requests have ended by then
MAX_BODY_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class LocalGateway:
    """The URL of the gateway, on the loopback, and its only API key."""

    url: str
    api_key: str


def _recorded(name: str, console: Console) -> ModelSource:
    cluster = found(name)
    return ModelSource(
        name=Path(cluster.model).name,
        cluster=name,
        alias=name,
        seeds=ClusterAddresses(
            routers=cluster.router_addresses,
            controller=cluster.controller_address,
            credentials=credentials_of(cluster),
        ),
        rediscover=lambda: ClusterAddresses(routers=find_routers(cluster, console)),
    )


def _remote(address: str) -> ModelSource:
    cluster = RemoteCluster(at_address(address, "", "--cluster"))
    seen = cluster.status()
    return ModelSource(
        name=Path(seen.checkpoint).name,
        cluster=seen.cluster,
        alias=seen.cluster,
        seeds=ClusterAddresses(routers=routers_in(seen), controller=address, credentials=cluster.credentials),
    )


@contextmanager
def local_gateway_to(name: str, max_inflight: int, console: Console) -> Iterator[LocalGateway]:
    """Serves a running cluster, under the name of its model's directory or of the cluster. name: of one that was
    started here, or the HOST:PORT of a controller, with $MOECLUSTER_SECRET_FILE.

    Raises ClusterNotFound if it is not up.
    """
    api_key = secrets.token_urlsafe(32)
    source = _remote(name) if ":" in name else _recorded(name, console)
    settings = ServeConfig(port=0, max_inflight=max_inflight, max_body_bytes=MAX_BODY_BYTES, grace_s=GRACE_S)
    server = GatewayServer(settings, ApiKeys([api_key]))
    thread = threading.Thread(target=server.run, args=([source],), name="gateway", daemon=True)
    thread.start()
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline_s:
                raise ResourceError(f"the gateway to the cluster {name} does not start")
            time.sleep(0.01)
        yield LocalGateway(url=f"http://{server.address}", api_key=api_key)
    finally:
        server.stop()
        thread.join(START_TIMEOUT_S)
