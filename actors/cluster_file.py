"""Records clusters that are up or being started: one small file per cluster in the user's state directory. A start is
recorded before anything of it exists, and holds a lock that the kernel releases however the process ends.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.local_ray import LocalRay
from actors.places import probe_folder
from moecluster.errors import ResourceError
from moecluster.rpc.credentials import ClusterCredentials, private_folder, read_secret, secret_path, state_folder
from moecluster.whole_file import write_whole

LOCK_PATIENCE_S = 1.0  # longer than is_starting holds it
LOCK_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class UpCluster:
    """A cluster that `moecluster up` started."""

    name: str
    ray_address: str
    model: str  # the directory that it serves
    router_addresses: tuple[str, ...]  # when this was recorded; a restarted router listens elsewhere
    controller_address: str
    secret_file: str = ""  # path of the secret; empty: the cluster has none
    tls_dir: str = ""  # absolute, as security.tls_dir; empty: plain text
    local_ray: LocalRay | None  # None: the Ray cluster is external, and not stopped with this one

    @property
    def router_address(self) -> str:
        """Address of the first router."""
        return self.router_addresses[0]

    def read_credentials(self) -> ClusterCredentials:
        """Reads the secret from its file, which must be named. Raises ConfigError."""
        return read_secret(self.secret_file, cluster=self.name, tls_dir=self.tls_dir)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start in progress or broken off, with what is needed to clean it up."""

    name: str
    ray_address: str  # of an external Ray; empty: a local one is started
    model: str
    pid: int  # of the command
    pid_start_ticks: int  # of that process, as start_ticks returns: its pid may be reused
    local_ray: LocalRay | None


def check() -> None:
    """Raises ResourceError if the state directory cannot be written: to be called before anything is started."""
    folder = state_folder()
    try:
        probe_folder(folder)
    except OSError as exc:
        raise _refused(folder, exc) from exc


def save(noted: UpCluster | Start) -> None:
    """Writes the file atomically, readable by the user alone. Raises ResourceError."""
    fields = dataclasses.asdict(noted) | ({"starting": True} if isinstance(noted, Start) else {})
    try:
        private_folder(state_folder())
        write_whole(_file(noted.name), json.dumps(fields, indent=1).encode(), mode=0o600)
    except OSError as exc:
        raise _refused(state_folder(), exc) from exc


def load(name: str) -> UpCluster | None:
    """Returns the cluster of that name, if it is up. Raises ResourceError for a file that cannot be read."""
    noted = _read(name)
    return noted if isinstance(noted, UpCluster) else None


def load_start(name: str) -> Start | None:
    """Returns the start of that name, if it has not completed. Raises ResourceError, as load does."""
    noted = _read(name)
    return noted if isinstance(noted, Start) else None


def forget(name: str) -> None:
    """Removes the file and the secret, if they exist. Raises ResourceError."""
    try:
        _file(name).unlink(missing_ok=True)
        secret_path(name).unlink(missing_ok=True)
    except OSError as exc:
        raise _refused(state_folder(), exc) from exc


def _refused(folder: Path, exc: OSError) -> ResourceError:
    return ResourceError(
        f"what is up is noted in {folder}, which cannot be made or written ({exc.strerror}); "
        "set XDG_STATE_HOME to a directory that you can write"
    )


@contextlib.contextmanager
def start_lock(name: str, patience_s: float = LOCK_PATIENCE_S) -> Iterator[bool]:
    """Takes the lock of the one process that starts the cluster, or ends a start. Yields whether it was acquired.

    Raises ResourceError if the state directory cannot be written.
    """
    with _lock_file(name) as descriptor:
        deadline_s = time.monotonic() + patience_s
        while not (ours := _try_lock(descriptor, fcntl.LOCK_EX)) and time.monotonic() < deadline_s:
            time.sleep(LOCK_POLL_S)
        yield ours


def is_starting(name: str) -> bool:
    """Returns whether a living process is starting the cluster, or ending a start."""
    with _lock_file(name) as descriptor:
        return not _try_lock(descriptor, fcntl.LOCK_SH)


@contextlib.contextmanager
def _lock_file(name: str) -> Iterator[int]:
    try:
        # Never removed: a lock on a removed file would exclude nobody.
        descriptor = os.open(_folder() / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise _refused(state_folder(), exc) from exc
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(name: str) -> UpCluster | Start | None:
    file = _file(name)
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        if exc.errno == errno.ENAMETOOLONG:
            return None  # no cluster can have this name
        raise ResourceError(f"{file} cannot be read ({exc.strerror}); set XDG_STATE_HOME as it was for `up`") from exc
    try:
        fields = json.loads(file.read_text())
        local = fields.pop("local_ray")
        fields["local_ray"] = LocalRay(**local) if local else None
        return _start(fields) if fields.pop("starting", False) else _up_cluster(fields)
    except FileNotFoundError:
        return None  # it was taken down just now
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ResourceError(f"{file} cannot be read ({exc}); remove it if no cluster {name} is up") from exc


def _start(fields: dict[str, Any]) -> Start:
    # Older files have a start time that depends on the clock. No process has 0: it is taken for one that has ended.
    if fields.pop("pid_started_s", None) is not None:
        fields["pid_start_ticks"] = 0
    return Start(**fields)


def _up_cluster(fields: dict[str, Any]) -> UpCluster:
    # Older files have a single router_address.
    routers = tuple(fields.pop("router_addresses", ())) or (fields.pop("router_address"),)
    return UpCluster(**fields, router_addresses=routers)


def _folder() -> Path:
    folder = state_folder()
    private_folder(folder)
    return folder


def _file(name: str) -> Path:
    return state_folder() / f"{name}.json"
