"""A gateway that serves on a free port in a thread of the test."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from openai import AsyncOpenAI, OpenAI

from moecluster.config.sections import SecurityConfig, ServeConfig
from moecluster.gateway.api_keys import ApiKeys
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import GatewayServer, ModelSource
from tests.support.waiting import WAIT_S, wait_until


class RunningGateway:
    """A started gateway."""

    def __init__(self, server: GatewayServer) -> None:
        self.server = server
        self.url = server.url

    @property
    def routers(self) -> Any:
        """The RouterDiscovery of the first model."""
        return self.server.gateway.models[0].discovery

    def openai(self, key: str = "none", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S, **options)

    def async_openai(self, key: str = "none") -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)


@contextmanager
def running_gateway(
    *sources: ModelSource | Sequence[str],
    keys: Sequence[str] = (),
    security: SecurityConfig | None = None,
    **settings: Any,
) -> Iterator[RunningGateway]:
    """Context: a gateway serves. sources: ModelSources, or router addresses of a model named "model". security: by
    default its /metrics are open. settings: fields of ServeConfig."""
    models = [
        source
        if isinstance(source, ModelSource)
        else ModelSource(
            name="model", cluster="cluster", alias="cluster", seeds=ClusterAddresses(routers=tuple(source))
        )
        for source in sources
    ]
    serve = ServeConfig(**{"port": 0, "grace_s": 2.0, **settings})
    server = GatewayServer(serve, security or SecurityConfig(open_metrics=True), ApiKeys(keys))
    thread = threading.Thread(target=server.run, args=(models,), name="gateway", daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the gateway's start")
    try:
        yield RunningGateway(server)
    finally:
        server.stop()
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the gateway does not end"
