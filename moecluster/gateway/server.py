"""The gateway as a server: its socket, start and graceful shutdown."""

import resource
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from moecluster.addresses import is_loopback, join_host_port
from moecluster.config.sections import SecurityConfig, ServeConfig
from moecluster.errors import ConfigError, ResourceError
from moecluster.gateway.api_keys import ApiKeys, read_api_keys
from moecluster.gateway.app import Gateway, build_app
from moecluster.gateway.connections import ConnectionLimits, guarded_protocol
from moecluster.gateway.metrics import GatewayMetrics
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.served_model import ServedModel
from moecluster.rpc.tls.https import HttpsCertificate
from moecluster.rpc.tls.material import TlsFiles

BACKLOG = 2048
OWN_FILES = 256
LOOP = "moecluster.gateway.event_loop:GatewayLoop"
KEEP_ALIVE_S = 75  # longer than that of common proxies: the side that closes first may cut off a request


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model to serve: its name, and where its cluster's routers were last seen."""

    name: str
    seeds: ClusterAddresses
    cluster: str = ""  # the name of the cluster, for the metrics
    alias: str = ""  # a second name, valid if it is the only model
    rediscover: Callable[[], ClusterAddresses] | None = None  # see RouterDiscovery


class GatewayServer:
    """Listens from the start; `run` serves until a signal or `stop`."""

    def __init__(self, settings: ServeConfig, security: SecurityConfig, keys: ApiKeys) -> None:
        """security: who may do without a key or token.

        Raises ResourceError if the port is in use, ConfigError for a certificate that cannot be used.
        """
        self.metrics = GatewayMetrics()
        self.gateway = Gateway(settings, security, keys, self.metrics)
        self._sources: Sequence[ModelSource] = ()
        certificate = _certificate(settings)
        self._socket = _listen(settings.host, settings.port)
        host, port = self._socket.getsockname()[:2]
        self._host = host
        self.address = join_host_port(host, port)
        self.url = f"{'http' if certificate is None else 'https'}://{self.address}"
        config = uvicorn.Config(
            build_app(self.gateway, self._make_models),
            loop=LOOP,
            ssl_context_factory=None if certificate is None else lambda *_: certificate.lasting_context(),
            http=guarded_protocol(_limits(settings)),
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(settings.grace_s),
        )
        self._server = uvicorn.Server(config)

    @property
    def wanted(self) -> str:
        """What clients must send as the bearer; empty: nothing, at least from this user."""
        if self.gateway.access.keys:
            return "KEY"
        return "" if self.gateway.access.is_open or is_loopback(self._host) else "TOKEN"

    @property
    def started(self) -> bool:
        """Whether requests are answered."""
        return self._server.started

    @property
    def open_connections(self) -> int:
        """Number of connections of clients."""
        return len(self._server.server_state.connections)

    @property
    def ending(self) -> bool:
        """Whether a signal or `stop` is ending it."""
        return self._server.should_exit

    def run(self, sources: Sequence[ModelSource]) -> None:
        """Serves until SIGINT or SIGTERM; responses in progress get serve.grace_s to end. Then raises the signal again.

        Raises ConfigError, as check_names does.
        """
        check_names([source.name for source in sources])
        self._sources = sources
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def stop(self) -> None:
        """Ends `run`, as a signal does. Called from another thread."""
        self._server.should_exit = True

    async def _make_models(self, stack: AsyncExitStack) -> Sequence[ServedModel]:
        return await open_models(self.gateway, self._sources, stack)


async def open_models(gateway: Gateway, sources: Sequence[ModelSource], stack: AsyncExitStack) -> Sequence[ServedModel]:
    """Starts looking for the sources' routers, in the running event loop, and returns the models. stack: ends it."""
    models = []
    for source in sources:
        model = ServedModel(
            source.name,
            source.seeds,
            gateway.settings,
            gateway.metrics,
            cluster=source.cluster,
            alias=source.alias,
            rediscover=source.rediscover,
        )
        stack.push_async_callback(model.discovery.close)
        await model.discovery.start()
        models.append(model)
    return models


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError if there is no model or a name occurs twice."""
    if not names:
        raise ConfigError("models: there is none to serve; give one or more, each as NAME=CLUSTER")
    if len(set(names)) != len(names):
        raise ConfigError(f"models: {', '.join(names)}: a name is given twice, and each must be its own")


def keys_for(settings: ServeConfig, security: SecurityConfig) -> ApiKeys:
    """Returns the API keys of the settings. Raises ConfigError if they, and prompts, would cross the network in the
    clear."""
    if not (settings.tls_certificate_file or security.allow_plaintext or is_loopback(settings.host)):
        raise ConfigError(
            f"serve.host: {settings.host} is reached from other machines, and keys, prompts and responses would cross "
            "the network unencrypted: give serve.tls_certificate_file and serve.tls_key_file, or set "
            "security.allow_plaintext = true if the network, or a proxy in front, encrypts already"
        )
    return keys_of(security)


def keys_of(security: SecurityConfig) -> ApiKeys:
    """Returns the API keys of the settings; none if they name no file. Raises ConfigError."""
    return read_api_keys(security.api_keys_file) if security.api_keys_file else ApiKeys()


def _certificate(settings: ServeConfig) -> HttpsCertificate | None:
    if not settings.tls_certificate_file:
        return None
    files = TlsFiles(certificate=Path(settings.tls_certificate_file), key=Path(settings.tls_key_file))
    return HttpsCertificate(files)


def _limits(settings: ServeConfig) -> ConnectionLimits:
    """Caps the connections at the file descriptors that the process may open, less what it needs itself."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = settings.max_connections if files == resource.RLIM_INFINITY else max(files - OWN_FILES, files // 2)
    return ConnectionLimits(
        max_connections=min(settings.max_connections, room),
        idle_s=KEEP_ALIVE_S,
        head_timeout_s=settings.head_timeout_s,
        send_timeout_s=settings.send_timeout_s,
    )


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as exc:
        listening.close()
        raise ResourceError(
            f"cannot listen on {join_host_port(host, port)} ({exc.strerror or exc}); choose another serve.host, or a "
            "free serve.port"
        ) from exc
    listening.set_inheritable(False)
    return listening
