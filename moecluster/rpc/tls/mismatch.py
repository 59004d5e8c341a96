"""Finds out why a server ends connections: it speaks TLS and this process does not, or the other way round, or one does
not take the other's certificate. A server that is being restarted ends them, too."""

import socket
import ssl

from moecluster.addresses import split_host_port
from moecluster.errors import TlsMismatch
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.tls.material import NAME, client_context

TIMEOUT_S = 3.0

WANTS_TLS = "it requires TLS, and plain text was sent: give the folder of certificates (tls_dir=, $MOECLUSTER_TLS_DIR)"
IS_PLAIN = "it speaks plain text, and TLS was asked for (tls_dir, $MOECLUSTER_TLS_DIR)"
OF_ANOTHER_CA = "its certificate is not of the CA in the folder of certificates here, or has expired"
REFUSES_OURS = (
    "it does not take the certificate in the folder of certificates here: it is not of the server's CA, or has expired "
    "(tls_dir, $MOECLUSTER_TLS_DIR)"
)


def mismatch_at(
    address: str, credentials: ClusterCredentials | None, *, timeout_s: float = TIMEOUT_S
) -> TlsMismatch | None:
    """Connects to host:port as a client with these credentials would; returns what does not fit, None if nothing is
    found: then it may be away for now.

    timeout_s: of each step. Raises ConfigError for certificates that cannot be used.
    """
    with_tls = credentials is not None and bool(credentials.tls_dir)
    if credentials is not None and with_tls:
        context = client_context(credentials.certificates.current())
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    why = _found(address, context, with_tls=with_tls, timeout_s=timeout_s)
    # A server that ended just then would not be found the same way twice.
    if why and _found(address, context, with_tls=with_tls, timeout_s=timeout_s) == why:
        return TlsMismatch(f"{address}: {why}")
    return None


def _found(address: str, context: ssl.SSLContext, *, with_tls: bool, timeout_s: float) -> str:
    try:
        with socket.create_connection(split_host_port(address), timeout=timeout_s) as plain:
            return _after_handshake(plain, context) if with_tls else _of_plain_text(plain, context)
    except (OSError, ValueError):
        return ""


def _of_plain_text(plain: socket.socket, context: ssl.SSLContext) -> str:
    with context.wrap_socket(plain, server_hostname=NAME):  # raises SSLError, an OSError, if that is no TLS
        return WANTS_TLS


def _after_handshake(plain: socket.socket, context: ssl.SSLContext) -> str:
    try:
        secured = context.wrap_socket(plain, server_hostname=NAME)
    except ssl.SSLCertVerificationError:
        return OF_ANOTHER_CA
    except ssl.SSLError as exc:
        return IS_PLAIN if exc.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE") else ""
    with secured:
        try:
            return "" if secured.recv(1) else REFUSES_OURS  # a server that takes it begins with its settings
        except TimeoutError:
            return ""
        except OSError:  # an alert, or a reset
            return REFUSES_OURS
