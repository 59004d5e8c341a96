"""Starts gRPC servers with the standard health and reflection services, and opens channels with matching options."""

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moecluster.addresses import ListenAddress, join_host_port
from moecluster.rpc.channels import AuthenticatedAsyncChannel, AuthenticatedChannel
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.fields import MAX_MESSAGE_BYTES
from moecluster.rpc.tls.material import NAME, TlsMaterial
from moecluster.rpc.tls.mutual import RotatingAsyncChannel, RotatingChannel, channel_credentials, server_credentials

KEEPALIVE_S = 10.0
KEEPALIVE_TIMEOUT_S = 5.0
HEALTH_SHUTDOWN_S = 2.0
LOOPBACK = ListenAddress()
MAX_CALLS = 128  # running at once, streams included; each holds a thread

_COMMON_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
    # On both sides: a server that does not permit them closes a connection without calls after three pings.
    ("grpc.keepalive_permit_without_calls", 1),
]
CHANNEL_OPTIONS = [
    *_COMMON_OPTIONS,
    # A shared subchannel would keep the reconnect backoff of a peer that has restarted since.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # The time that one attempt may take: on a busy host, or with TLS over a network with a delay of 200 ms and losses.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
    # Callers retry themselves. With gRPC's own retries (1.85.1), a streamed call that begins while the peer sends
    # GOAWAY may never end, despite its deadline.
    ("grpc.enable_retries", 0),
]
TLS_CHANNEL_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.ssl_target_name_override", NAME),  # what counts is the cluster's CA; addresses may change
]
SERVER_OPTIONS = [
    *_COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),  # binding a port in use fails instead of sharing its calls
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
]


def open_channel(address: str, credentials: ClusterCredentials | None = None) -> grpc.Channel:
    """Opens a channel to host:port with the project's limits and keepalive. credentials: sent with every call; with a
    tls_dir, over mutual TLS. Raises ConfigError for certificates that cannot be used."""
    if credentials is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    if not credentials.tls_dir:
        return AuthenticatedChannel(grpc.insecure_channel(address, options=CHANNEL_OPTIONS), credentials)

    def connect(material: TlsMaterial) -> grpc.Channel:
        return grpc.secure_channel(address, channel_credentials(material), options=TLS_CHANNEL_OPTIONS)

    return AuthenticatedChannel(RotatingChannel(credentials.certificates, connect), credentials)


def open_async_channel(address: str, credentials: ClusterCredentials | None = None) -> grpc.aio.Channel:
    """Opens an asyncio channel on the running event loop; otherwise like open_channel."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    if not credentials.tls_dir:
        return AuthenticatedAsyncChannel(grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS), credentials)

    def connect(material: TlsMaterial) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(address, channel_credentials(material), options=TLS_CHANNEL_OPTIONS)

    return AuthenticatedAsyncChannel(RotatingAsyncChannel(credentials.certificates, connect), credentials)


class RunningServer:
    """A started server. address is host:port, as others reach it; id is a name of its health service that no other
    server has."""

    def __init__(self, server: grpc.Server, address: str, servicer: health.HealthServicer) -> None:
        self._server = server
        self._health = servicer
        self.address = address
        self.id = secrets.token_hex(8)
        servicer.set(self.id, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_s: float = 1.0) -> None:
        """Sets health to NOT_SERVING, gives running calls grace_s to end, then cancels the rest."""
        # In a thread: if a watcher leaves meanwhile, it and gRPC's own thread wait for each other (1.85.1).
        telling = threading.Thread(target=self._health.enter_graceful_shutdown, name="health-shutdown", daemon=True)
        telling.start()
        telling.join(HEALTH_SHUTDOWN_S)
        self._server.stop(grace_s).wait(grace_s + 5.0)


def start_server(
    name: str,
    add_servicer: Callable[[grpc.Server], object],
    *,
    credentials: ClusterCredentials | None,
    listen: ListenAddress = LOOPBACK,
    max_calls: int = MAX_CALLS,
) -> RunningServer:
    """Starts a server of one service plus health and reflection.

    name: the service's full name. add_servicer: registers the servicer. credentials: required by every method of every
    service except health, or tokens made from them; with a tls_dir, over mutual TLS only. None, in tests only: calls
    need no secret. Raises ResourceError if it cannot listen, ConfigError for certificates that cannot be used.
    """
    # Imports jwt, which takes a quarter of a second: clients do without.
    from moecluster.rpc.authentication import RequireCredentials

    tls = server_credentials(credentials.certificates) if credentials is not None and credentials.tls_dir else None
    pool = ThreadPoolExecutor(max_workers=max_calls, thread_name_prefix="rpc")
    interceptors: list[grpc.ServerInterceptor] = [] if credentials is None else [RequireCredentials(credentials)]
    server = grpc.server(pool, interceptors=interceptors, options=SERVER_OPTIONS, maximum_concurrent_rpcs=max_calls)
    add_servicer(server)
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for served in ("", name):
        servicer.set(served, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection([name, health.SERVICE_NAME, reflection.SERVICE_NAME], server)

    def bind(port: int) -> int:
        target = join_host_port(listen.host, port)
        try:
            return server.add_insecure_port(target) if tls is None else server.add_secure_port(target, tls)
        except RuntimeError as exc:
            raise OSError(str(exc)) from exc

    bound = listen.bind(bind)
    server.start()
    return RunningServer(server, listen.advertised(bound), servicer)
