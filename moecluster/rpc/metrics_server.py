"""Serves a process' /metrics over HTTP, to whoever has the cluster's secret or a token with the scope read. The
controller's also lists all processes of the cluster at /sd, for Prometheus' service discovery.

The exposition is prometheus_client's own. Around it: the check, TLS, and limits that a slow or greedy client runs into.
"""

import io
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app

from moecluster.addresses import ListenAddress
from moecluster.errors import MissingScope, Unauthenticated
from moecluster.metrics import Metrics
from moecluster.rpc.authentication import BearerCheck
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.scopes import Scope
from moecluster.rpc.scrape_targets import ScrapeTarget, service_discovery
from moecluster.rpc.tls.https import HttpsCertificate
from moecluster.rpc.tls.material import TlsFiles

logger = logging.getLogger(__name__)

LOOPBACK = ListenAddress()
SERVICE_DISCOVERY = "/sd"
TIMEOUT_S = 10.0  # for a handshake, a request's headers, and a client that does not read
MAX_CONNECTIONS = 32  # each holds a thread
WANTED = (
    "send the header Authorization: Bearer CREDENTIAL with a token of the cluster (moecluster token --scope read), or "
    "its secret"
)
App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class MetricsServer:
    """A started server of /metrics, and of /sd once there is a list. address is host:port, as others reach it."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        credentials: ClusterCredentials | None,
        listen: ListenAddress = LOOPBACK,
        is_open: bool = False,
    ) -> None:
        """credentials: what clients are checked against; with a tls_dir, over TLS only; None, in tests only: nobody is
        checked. is_open: everybody may read.

        Raises ResourceError if it cannot listen, ConfigError for certificates that cannot be used.
        """
        self._targets: Callable[[], tuple[ScrapeTarget, ...]] | None = None
        app = _reported(self._routed(make_wsgi_app(metrics.registry)))
        certificate = None
        if credentials is not None:
            if not is_open:
                app = _guarded(app, BearerCheck(credentials))
            if credentials.tls_dir:
                of_all = TlsFiles.in_folder(credentials.tls_dir)
                certificate = HttpsCertificate(TlsFiles(certificate=of_all.certificate, key=of_all.key))
        self._scheme = "http" if certificate is None else "https"
        self._server = listen.bind(lambda port: _Server((listen.host, port), app, certificate))
        self.port: int = self._server.server_port
        self.address = listen.advertised(self.port)
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def list_targets(self, targets: Callable[[], tuple[ScrapeTarget, ...]]) -> None:
        """Serves a list of what Prometheus should scrape at /sd; the function is called at every request."""
        self._targets = targets

    def close(self) -> None:
        """Stops serving. Idempotent."""
        self._server.shutdown()
        self._server.server_close()

    def _routed(self, metrics: App) -> App:
        """Wraps an app of /metrics, which serves every other path, too."""

        def routed(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if environ.get("PATH_INFO") != SERVICE_DISCOVERY:
                return metrics(environ, start_response)
            if self._targets is None:
                start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
                return [b"this process knows no others; the controller's /sd lists all\n"]
            content = service_discovery(self._targets(), scheme=self._scheme)
            start_response("200 OK", [("Content-Type", "application/json")])
            return [content]

        return routed


def _guarded(app: App, check: BearerCheck) -> App:
    """Wraps an app that only the holders of the scope read may use."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            check.caller(environ.get("HTTP_AUTHORIZATION", "")).require(Scope.READ, environ.get("PATH_INFO", ""))
        except (Unauthenticated, MissingScope) as exc:
            is_known = isinstance(exc, MissingScope)
            challenge = [] if is_known else [("WWW-Authenticate", "Bearer")]
            start_response(
                "403 Forbidden" if is_known else "401 Unauthorized",
                [("Content-Type", "text/plain; charset=utf-8"), *challenge],
            )
            return [f"{exc}; {WANTED}\n".encode()]
        return app(environ, start_response)

    return guarded


def _reported(app: App) -> App:
    """Wraps an app whose bugs are to be seen."""

    def reported(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            return app(environ, start_response)
        except Exception:
            logger.exception("/metrics cannot be rendered")
            raise

    return reported


class _Handler(WSGIRequestHandler):
    """One request on one connection."""

    timeout = TIMEOUT_S

    def get_stderr(self) -> Any:
        """Where wsgiref prints a traceback for every client that breaks off: nowhere."""
        return io.StringIO()

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: scrapes come every few seconds."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread for each connection, with a limit: beyond it, the oldest connection is closed."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], app: App, certificate: HttpsCertificate | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._certificate = certificate
        self._connections: dict[Any, socket.socket] = {}  # accepted -> with TLS, oldest first
        self._lock = threading.Lock()
        super().__init__(address, _Handler)
        self.set_app(app)

    def server_bind(self) -> None:
        """Binds, without the look-up of the host's name that http.server makes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]  # of both families
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Makes room for a new connection, then handles it in its own thread."""
        with self._lock:
            if len(self._connections) >= MAX_CONNECTIONS:
                oldest = next(iter(self._connections))
                with suppress(OSError):
                    self._connections.pop(oldest).shutdown(socket.SHUT_RDWR)
            self._connections[request] = request
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Makes the handshake here, in the connection's own thread, so that a slow client holds up nobody."""
        request.settimeout(TIMEOUT_S)
        if self._certificate is None:
            super().finish_request(request, client_address)
            return
        with self._certificate.context().wrap_socket(
            request, server_side=True, do_handshake_on_connect=False
        ) as secured:
            with self._lock:
                if request in self._connections:
                    self._connections[request] = secured
            secured.do_handshake()
            super().finish_request(secured, client_address)

    def close_request(self, request: Any) -> None:
        """Forgets a connection that has ended."""
        with self._lock:
            self._connections.pop(request, None)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that break off, speak no TLS or are too slow are no news."""
        logger.debug("a connection to /metrics failed", exc_info=True)
