"""The certificates of a process: reads them from files, proves that they fit together, and follows their changes.

The folder that a cluster's processes read has the layout of a Kubernetes TLS secret, as cert-manager writes it: ca.crt,
tls.crt and tls.key, in PEM.
"""

import logging
import os
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from moecluster.errors import ConfigError
from moecluster.rpc.shortage import is_shortage

logger = logging.getLogger(__name__)

NAME = "moecluster"  # the DNS name in all certificates of a cluster: nodes' addresses may change
MAX_FILE_BYTES = 256 * 1024
LOOK_EVERY_S = 1.0
READ_ATTEMPTS = 3
WARN_BEFORE_S = 7 * 86400.0
MAX_ROUND_TRIPS = 8  # of a handshake

# https://docs.openssl.org/master/man3/X509_STORE_CTX_get_error/
_NOT_YET_VALID, _EXPIRED, _WRONG_PURPOSE, _WRONG_NAME = 9, 10, 26, 62
_UNKNOWN_ISSUER = (2, 7, 18, 19, 20, 21)

Version = tuple[tuple[int, int, int], ...]  # of files: changes when one of them is written or replaced


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """Where certificate and key are."""

    certificate: Path  # with those between it and the CA's
    key: Path  # must not be readable by everybody
    ca: Path | None = None  # whom peers' certificates must be signed by; None: for a server whose clients need none

    @classmethod
    def in_folder(cls, folder: str | Path) -> "TlsFiles":
        """Returns the files of security.tls_dir."""
        return cls(certificate=Path(folder) / "tls.crt", key=Path(folder) / "tls.key", ca=Path(folder) / "ca.crt")

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.certificate, self.key) if self.ca is None else (self.certificate, self.key, self.ca)


@dataclass(frozen=True, kw_only=True)
class TlsMaterial:
    """The content of the files."""

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    ca: bytes = field(default=b"", repr=False)
    expires_s: float = 0.0  # Unix time at which the certificate expires


class FollowedMaterial:
    """The newest material of some files. Thread-safe."""

    def __init__(self, files: TlsFiles, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError, in one line, for what is missing or wrong."""
        self._files = files
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_s = clock()
        self._material, self._seen = _read_whole(files)

    def current(self) -> TlsMaterial:
        """Returns the material; the same object until it changes. Looks at the files at most once a second.

        Files that do not fit together, as while they are being replaced, are not used; the log says why.
        """
        with self._lock:
            now_s = self._clock()
            if now_s - self._looked_s >= LOOK_EVERY_S:
                self._looked_s = now_s
                self._look()
            return self._material

    def _look(self) -> None:
        version: Version = ()
        try:
            version = _version(self._files)
            if version == self._seen:
                return
            self._material, version = _read_whole(self._files)
            logger.info("%s was read again after a change", self._files.certificate)
        except ConfigError as exc:
            if is_shortage(exc.__cause__):
                logger.warning("the certificate read before stays in use for now: %s", exc)
                return  # not seen: they are looked at again
            if version != self._seen:  # once for each state of the files
                logger.warning("the certificate read before stays in use: %s", exc)
        self._seen = version


def read_material(files: TlsFiles) -> TlsMaterial:
    """Reads the files and proves that they fit together, now. Raises ConfigError, in one line."""
    return _read_whole(files)[0]


def server_context(material: TlsMaterial) -> ssl.SSLContext:
    """Returns a context for servers; with a CA it requires certificates of clients. Raises ssl.SSLError if the key does
    not fit the certificate, ConfigError if no file can be opened."""
    return _with_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), material)


def client_context(material: TlsMaterial) -> ssl.SSLContext:
    """Returns a context for clients, which show the certificate too. Raises what server_context does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=material.ca.decode("ascii", errors="ignore"))
    return _with_chain(context, material)


def _read_whole(files: TlsFiles) -> tuple[TlsMaterial, Version]:
    """Returns what the files held at one moment, and their version then."""
    for _ in range(READ_ATTEMPTS):
        before = _version(files)
        material = TlsMaterial(
            certificate=_content(files.certificate),
            key=_content(files.key),
            ca=_content(files.ca) if files.ca is not None else b"",
        )
        if _version(files) == before:
            return _proven(material, files), before
    raise ConfigError(f"{files.certificate}: the files change while they are read")


def _version(files: TlsFiles) -> Version:
    found = []
    for path in files.paths:
        try:
            status = path.stat()
        except OSError as exc:
            raise ConfigError(f"{path}: cannot be read ({exc.strerror}); {_wanted(files)}") from exc
        found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    if stat.S_IMODE(files.key.stat().st_mode) & 0o007:
        raise ConfigError(f"{files.key}: everybody may read this private key: chmod 600 {files.key}")
    return tuple(found)


def _content(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe is no reason to wait
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"{path}: is no file; expected PEM")
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read ({exc.strerror})") from exc
    if not 0 < len(content) <= MAX_FILE_BYTES:
        raise ConfigError(f"{path}: holds {len(content)} bytes or more, expected PEM of at most {MAX_FILE_BYTES}")
    return content


def _wanted(files: TlsFiles) -> str:
    if files.ca is None:
        return "expected a certificate and its private key, in PEM"
    return f"expected ca.crt, tls.crt and tls.key there, on every node: moecluster certs {files.certificate.parent}"


def _proven(material: TlsMaterial, files: TlsFiles) -> TlsMaterial:
    """Returns the material with its expiry, after a handshake with itself: as peers will see it."""
    if b"ENCRYPTED" in material.key:
        raise ConfigError(f"{files.key}: is encrypted; expected a private key without a passphrase")
    _refuse_no_certificate(material.certificate, files.certificate)
    if files.ca is not None:
        _refuse_no_certificate(material.ca, files.ca)
    try:
        server = server_context(material)
    except ssl.SSLError as exc:
        why = "is not the key of" if exc.reason == "KEY_VALUES_MISMATCH" else "is no private key in PEM for"
        raise ConfigError(f"{files.key}: {why} the certificate {files.certificate}") from exc
    if files.ca is not None:
        client = client_context(material)
    else:  # then only its dates are judged
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        client.load_verify_locations(cadata=_first_certificate(material.certificate))
    try:
        expires_s = _handshake(server, client)
    except ssl.SSLError as exc:
        raise ConfigError(_why_refused(exc, files)) from exc
    if expires_s - time.time() < WARN_BEFORE_S:
        logger.warning("%s expires within %.1f days", files.certificate, (expires_s - time.time()) / 86400)
    return TlsMaterial(certificate=material.certificate, key=material.key, ca=material.ca, expires_s=expires_s)


def _with_chain(context: ssl.SSLContext, material: TlsMaterial) -> ssl.SSLContext:
    try:
        with _as_file(material.certificate + b"\n" + material.key) as path:
            context.load_cert_chain(path, password=str)  # an empty one, since it would ask at the terminal otherwise
    except ssl.SSLError:
        raise
    except OSError as exc:
        raise ConfigError(f"certificates cannot be loaded ({exc.strerror})") from exc
    if material.ca and context.verify_mode is not ssl.CERT_REQUIRED:
        context.load_verify_locations(cadata=material.ca.decode("ascii", errors="ignore"))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _refuse_no_certificate(content: bytes, path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii", errors="ignore"))
    except (ssl.SSLError, ValueError) as exc:
        raise ConfigError(f"{path}: holds no certificate in PEM") from exc


def _first_certificate(content: bytes) -> str:
    end = b"-----END CERTIFICATE-----"
    return (content.partition(end)[0] + end).decode("ascii", errors="ignore")


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Context: the path of a file in memory, for OpenSSL, which loads keys from files alone."""
    fd = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> float:
    """Connects the two in memory; returns when the server's certificate expires. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    at_client = client.wrap_bio(to_client, to_server, server_hostname=NAME)
    sides = [at_client, server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(MAX_ROUND_TRIPS):
        for side in list(sides):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            sides.remove(side)
    if sides:
        raise ssl.SSLError("the handshake does not end")
    seen = at_client.getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(seen["notAfter"])))


def _why_refused(error: ssl.SSLError, files: TlsFiles) -> str:
    code = getattr(error, "verify_code", None)
    if code == _EXPIRED:
        if files.ca is None:
            return f"{files.certificate}: the certificate has expired"
        return (
            f"{files.certificate}: the certificate, or that of {files.ca} which signed it, has expired; make a new "
            f"one: moecluster certs {files.certificate.parent} --renew"
        )
    if code == _NOT_YET_VALID:
        return f"{files.certificate}: the certificate is not valid yet; is this host's clock right?"
    if code == _WRONG_NAME:
        return f"{files.certificate}: the certificate is not for the DNS name {NAME}, which all of a cluster carry"
    if code in _UNKNOWN_ISSUER:
        return f"{files.certificate}: the certificate is not signed by {files.ca}"
    if code == _WRONG_PURPOSE:
        return f"{files.certificate}: the certificate is not for both ends of a connection (serverAuth, clientAuth)"
    return f"{files.certificate}: the certificate cannot be used: {getattr(error, 'verify_message', '') or error}"
