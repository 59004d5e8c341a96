"""Connections that no client of the product makes, and how a server ends them."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moecluster.rpc.tls.material import NAME
from tests.support.waiting import WAIT_S

GARBAGE = bytes(range(255, -1, -1)) * 16
HTTP_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
TLS_ALERT = 0x15
BEGIN_OF_HTTP2 = {4, 8}  # SETTINGS and WINDOW_UPDATE, which a server sends before it has read anything
FRAME_HEADER_BYTES = 9


def connect(address: str) -> socket.socket:
    """Opens a bare connection to host:port."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def end_of(address: str, sent: bytes) -> str:
    """Sends bytes, and nothing more; returns how the server answers until it ends the connection."""
    with connect(address) as connection:
        received = bytearray()
        with suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(sent)
            while part := connection.recv(65536):
                received += part
    return answer_of(bytes(received))


def answer_of(received: bytes) -> str:
    """Returns what kind of answer the bytes are."""
    if not received:
        return "closed"
    if received[0] == TLS_ALERT:
        return "TLS alert"
    if received.startswith(b"HTTP/1."):
        return f"HTTP {received.split()[1].decode()}"
    if received.startswith(b"<!DOCTYPE"):
        return "HTTP 400" if b"Error code: 400" in received else "a page"  # http.server's, to HTTP/0.9
    frames = set(_http2_frames(received))
    return "nothing" if frames <= BEGIN_OF_HTTP2 else f"HTTP/2 frames {sorted(frames)}"


def _http2_frames(received: bytes) -> Iterator[int]:
    while len(received) >= FRAME_HEADER_BYTES:
        yield received[3]
        received = received[FRAME_HEADER_BYTES + int.from_bytes(received[:3], "big") :]


def client_hello() -> bytes:
    """Returns the first bytes of a TLS client."""
    out = ssl.MemoryBIO()
    handshake = _unproven().wrap_bio(ssl.MemoryBIO(), out, server_hostname=NAME)
    with suppress(ssl.SSLWantReadError):
        handshake.do_handshake()
    return out.read()


def tls_end_of(address: str, *, certificate: tuple[bytes, bytes] | None, folder: Path) -> str:
    """Makes a TLS connection for HTTP/2 and reads; returns how the server ends it. certificate: the client's own and
    its key; None: it shows none. folder: gets them as a file."""
    context = _unproven()
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        pem = folder / "client.pem"
        pem.write_bytes(b"\n".join(certificate))
        context.load_cert_chain(pem)
    try:
        with connect(address) as plain, context.wrap_socket(plain, server_hostname=NAME) as secured:
            secured.sendall(HTTP2_PREFACE)
            return answer_of(secured.recv(65536))
    except ssl.SSLError as exc:
        return str(exc.reason)
    except (ConnectionResetError, BrokenPipeError):
        return "closed"


@contextmanager
def held(address: str, sent: bytes, count: int = 3) -> Iterator[None]:
    """Context: so many connections have sent these bytes, and wait."""
    connections = [connect(address) for _ in range(count)]
    try:
        for connection in connections:
            connection.sendall(sent)
        yield
    finally:
        for connection in connections:
            connection.close()


def _unproven() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
