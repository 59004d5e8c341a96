"""TLS of HTTP servers, whose clients show no certificate: new connections get the newest certificate on disk."""

import logging
import ssl
import threading

from moecluster.errors import ConfigError
from moecluster.rpc.tls.material import FollowedMaterial, TlsFiles, server_context

logger = logging.getLogger(__name__)


class HttpsCertificate:
    """The certificate of one HTTPS server. Thread-safe."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises ConfigError for files that cannot be used."""
        self._followed = FollowedMaterial(files)
        self._lock = threading.Lock()
        self._material = self._followed.current()
        self._context = server_context(self._material)

    def context(self) -> ssl.SSLContext:
        """Returns the context for one new connection."""
        material = self._followed.current()
        with self._lock:
            if material is not self._material:
                try:
                    self._material, self._context = material, server_context(material)
                except ConfigError as exc:
                    logger.warning("the certificate read before stays in use for now: %s", exc)
            return self._context

    def lasting_context(self) -> ssl.SSLContext:
        """Returns a context for a server that keeps one: each handshake changes over to the newest certificate."""
        context = server_context(self._material)

        def change_over(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            connection.context = self.context()

        context.sni_callback = change_over  # also called for a client that names no server
        return context
