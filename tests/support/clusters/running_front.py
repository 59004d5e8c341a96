"""A front that serves on a free port, in a thread of the test."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from openai import AsyncOpenAI, OpenAI

from moecluster.config.sections import ServeConfig
from moecluster.gateway.api_keys import ApiKeys
from moecluster.gateway.router_discovery import Whereabouts
from moecluster.gateway.server import FrontServer, ModelSource

WAIT_S = 60.0


class RunningFront:
    """A started front."""

    def __init__(self, server: FrontServer) -> None:
        self.server = server
        self.url = f"http://{server.address}"

    @property
    def routers(self) -> Any:
        """The directory of the first model."""
        return self.server.front.models[0].directory

    @property
    def connections(self) -> Any:
        """Those that are open."""
        return self.server._server.server_state.connections

    def openai(self, key: str = "none", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S, **options)

    def async_openai(self, key: str = "none") -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)


@contextmanager
def running_front(
    *sources: ModelSource | Sequence[str], keys: Sequence[str] = (), **settings: Any
) -> Iterator[RunningFront]:
    """sources: models; or addresses of routers, of a model that is named model. settings: of [serve]."""
    models = [
        source
        if isinstance(source, ModelSource)
        else ModelSource(name="model", cluster="cluster", alias="cluster", seeds=Whereabouts(routers=tuple(source)))
        for source in sources
    ]
    server = FrontServer(ServeConfig(**{"port": 0, "grace_s": 2.0, **settings}), ApiKeys(keys))
    thread = threading.Thread(target=server.run, args=(models,), name="front", daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield RunningFront(server)
    finally:
        server.stop()
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the front does not end"


def wait_for(condition: Any, timeout_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.01)
