"""What allows calling a cluster's servers, its secret or a token: makes the secret, reads and writes files."""

import json
import os
import re
import secrets
import stat
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from moecluster.errors import ConfigError, ResourceError
from moecluster.whole_file import write_whole

if TYPE_CHECKING:
    from moecluster.rpc.tls.material import FollowedMaterial

SECRET_BYTES = 32
SECRET = re.compile(r"[A-Za-z0-9_-]{32,512}")
TOKEN = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
MAX_TOKEN_CHARACTERS = 2048
CLUSTER = "moecluster"  # the default of cluster.name
MAX_FILE_BYTES = 4096
SECRET_FILE_VARIABLE = "MOECLUSTER_SECRET_FILE"
TLS_DIR_VARIABLE = "MOECLUSTER_TLS_DIR"


@dataclass(frozen=True, kw_only=True)
class ClusterCredentials:
    """What clients send to a cluster, and servers check: the secret, or a token made from it, which only clients use.

    Neither ever appears in repr, str or an error. Where the certificates of mutual TLS are belongs to it; their content
    does not, since every host has its own.
    """

    secret: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    cluster: str = CLUSTER  # its name, which tokens are made for
    tls_dir: str = ""  # folder of certificates, as security.tls_dir; empty: plain text

    def __post_init__(self) -> None:
        if bool(self.secret) == bool(self.token):
            raise ConfigError("credentials: expected either the cluster's secret or a token")
        if self.secret and not SECRET.fullmatch(self.secret):
            raise ConfigError(
                f"the cluster secret has {len(self.secret)} characters, expected 32 to 512 letters, digits, - and _, "
                "as moecluster up writes them"
            )
        if self.token and not is_token(self.token):
            raise ConfigError("the token is none that moecluster token prints")

    @classmethod
    def make(cls, *, cluster: str = CLUSTER, tls_dir: str = "") -> Self:
        """Makes a new secret."""
        return cls(secret=secrets.token_urlsafe(SECRET_BYTES), cluster=cluster, tls_dir=tls_dir)

    @cached_property
    def certificates(self) -> "FollowedMaterial":
        """The certificates in tls_dir, for all that these credentials are given to: what opens a connection while the
        files are being replaced uses those read before. Raises ConfigError."""
        from moecluster.rpc.tls.material import FollowedMaterial, TlsFiles

        return FollowedMaterial(TlsFiles.in_folder(self.tls_dir))

    def __getstate__(self) -> dict[str, str]:
        """Certificates stay on their host."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def bearer(self) -> str:
        """The secret or the token."""
        return self.secret or self.token

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that a client sends with every call."""
        return (("authorization", f"Bearer {self.bearer}"),)


def is_token(text: str) -> bool:
    """Returns whether a text has the form of a token; a secret has not."""
    return len(text) <= MAX_TOKEN_CHARACTERS and TOKEN.fullmatch(text) is not None


def state_folder() -> Path:
    """$XDG_STATE_HOME/moecluster, by default ~/.local/state/moecluster. Raises ResourceError if there is no home."""
    root = os.environ.get("XDG_STATE_HOME")
    if root and not os.path.isabs(root):
        raise ResourceError(f'XDG_STATE_HOME: got "{root}", expected an absolute path for the state of clusters')
    try:
        return Path(root or Path.home() / ".local" / "state") / "moecluster"
    except RuntimeError as exc:
        raise ResourceError(
            "the state of clusters belongs in the home directory, and there is none: set XDG_STATE_HOME (or HOME) to a "
            "directory that you can write"
        ) from exc


def secret_path(cluster: str) -> Path:
    """The secret file of a cluster that this user started on this host."""
    return state_folder() / f"{cluster}.secret"


def local_credentials(cluster: str = CLUSTER) -> ClusterCredentials:
    """Credentials of a cluster that this user started on this host, by its name. Raises ConfigError without a file."""
    return read_secret(secret_path(cluster), cluster=cluster, tls_dir=_recorded_tls_dir(cluster))


def given_credentials(*, cluster: str = CLUSTER) -> ClusterCredentials | None:
    """Credentials from the file that $MOECLUSTER_SECRET_FILE names; None if it is unset. Raises ConfigError."""
    path = os.environ.get(SECRET_FILE_VARIABLE)
    return read_secret(path, cluster=cluster) if path else None


def secret_to_start_with(*, cluster: str, tls_dir: str = "") -> ClusterCredentials:
    """Returns the secret for a cluster that is about to start: the one in the file that $MOECLUSTER_SECRET_FILE names,
    so that whoever has it can use the cluster, else a new one. Raises ConfigError for a token."""
    path = os.environ.get(SECRET_FILE_VARIABLE)
    if not path:
        return ClusterCredentials.make(cluster=cluster, tls_dir=tls_dir)
    given = read_secret(path, cluster=cluster, tls_dir=tls_dir)
    if not given.secret:
        raise ConfigError(f"{SECRET_FILE_VARIABLE}: {path} holds a token, and a cluster starts with a secret")
    return given


def _recorded_tls_dir(cluster: str) -> str | None:
    """The folder of certificates in what `moecluster up` recorded of a cluster; None if nothing is to be found."""
    try:
        recorded = json.loads((state_folder() / f"{cluster}.json").read_text())
        return str(recorded["tls_dir"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def private_folder(folder: Path) -> None:
    """Creates the folder if necessary and makes it accessible to its owner only. Raises OSError; ResourceError if it
    belongs to another user."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise ResourceError(
            f"{folder}: belongs to another user (uid {found.st_uid}); set XDG_STATE_HOME to a folder of yours"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)


def write_secret(path: Path, credentials: ClusterCredentials) -> None:
    """Writes the secret to a file that only its owner can read from its creation on. Raises ResourceError."""
    try:
        private_folder(path.parent)
        write_whole(path, credentials.bearer.encode(), mode=0o600)
    except OSError as exc:
        raise ResourceError(f"{path}: the cluster's secret cannot be written ({exc.strerror})") from exc


def read_secret(path: str | Path, *, cluster: str = CLUSTER, tls_dir: str | Path | None = None) -> ClusterCredentials:
    """Reads the secret, or a token, from a file. Raises ConfigError, which names the file but never its content.

    cluster: its name, for a process that checks or makes tokens. tls_dir: folder of certificates; "": plain text;
    None: the one that $MOECLUSTER_TLS_DIR names, if any.
    """
    folder = os.environ.get(TLS_DIR_VARIABLE, "") if tls_dir is None else str(tls_dir)
    folder = os.path.abspath(folder) if folder else ""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"{path}: is no file; expected the cluster secret that moecluster up has written")
            if stat.S_IMODE(found.st_mode) & 0o007:
                raise ConfigError(f"{path}: everybody may read this secret; make it yours alone: chmod 600 {path}")
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"{path}: the cluster secret cannot be read ({exc.strerror})") from exc
    text = content.strip().decode("ascii", errors="replace")
    if is_token(text):
        return ClusterCredentials(token=text, cluster=cluster, tls_dir=folder)
    if not SECRET.fullmatch(text):
        raise ConfigError(
            f"{path}: holds no cluster secret (32 to 512 letters, digits, - and _ in one line), and no token"
        )
    return ClusterCredentials(secret=text, cluster=cluster, tls_dir=folder)
