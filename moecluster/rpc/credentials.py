"""The cluster secret, which allows calling the cluster's servers: creates it, and writes and reads its file."""

import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from moecluster.errors import ConfigError, ResourceError

SECRET_BYTES = 32
SECRET = re.compile(r"[A-Za-z0-9_-]{32,512}")
MAX_FILE_BYTES = 4096
SECRET_FILE_VARIABLE = "MOECLUSTER_SECRET_FILE"


@dataclass(frozen=True, kw_only=True)
class ClusterCredentials:
    """The credentials that servers check and clients send. The secret never appears in repr, str or an error."""

    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        if not SECRET.fullmatch(self.secret):
            raise ConfigError(
                f"the cluster secret has {len(self.secret)} characters, expected 32 to 512 letters, digits, - and _, "
                "as moecluster up writes them"
            )

    @classmethod
    def make(cls) -> Self:
        """Makes a new secret."""
        return cls(secret=secrets.token_urlsafe(SECRET_BYTES))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that a client sends with every call."""
        return (("authorization", f"Bearer {self.secret}"),)


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


def local_credentials(cluster: str = "moecluster") -> ClusterCredentials:
    """Credentials of a cluster that this user started on this host, by its name. Raises ConfigError without a file."""
    return read_secret(secret_path(cluster))


def given_credentials() -> ClusterCredentials | None:
    """Credentials from the file that $MOECLUSTER_SECRET_FILE names; None if it is unset. Raises ConfigError."""
    path = os.environ.get(SECRET_FILE_VARIABLE)
    return read_secret(path) if path else None


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
        path.unlink(missing_ok=True)  # left by a cluster that ended without `moecluster down`
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(credentials.secret)
    except OSError as exc:
        raise ResourceError(f"{path}: the cluster's secret cannot be written ({exc.strerror})") from exc


def read_secret(path: str | Path) -> ClusterCredentials:
    """Reads the secret from a file. Raises ConfigError, which names the file but never its content."""
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
    secret = content.strip().decode("ascii", errors="replace")
    if not SECRET.fullmatch(secret):
        raise ConfigError(f"{path}: holds no cluster secret; expected 32 to 512 letters, digits, - and _ in one line")
    return ClusterCredentials(secret=secret)
