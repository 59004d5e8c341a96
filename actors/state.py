"""What is up: one small file per cluster in the user's state directory, so that later commands find it."""

import dataclasses
import errno
import json
import stat
from dataclasses import dataclass
from pathlib import Path

from actors.local_ray import LocalRay
from actors.places import probe_folder
from moecluster.errors import ResourceError
from moecluster.rpc.credentials import private_folder, secret_path, state_folder


@dataclass(frozen=True, kw_only=True)
class UpCluster:
    """A cluster that `up` started."""

    name: str
    ray_address: str
    model: str  # the directory that it serves
    router_addresses: tuple[str, ...]  # when this was noted; a router that was started again listens elsewhere
    controller_address: str
    secret_file: str = ""  # where the secret lies; empty: the cluster asks for none
    local_ray: LocalRay | None  # None: the Ray cluster is not ours to end

    @property
    def router_address(self) -> str:
        """Of the first router."""
        return self.router_addresses[0]


def check() -> None:
    """Raises ResourceError if nothing can be noted: to be asked before anything is started."""
    folder = state_folder()
    try:
        probe_folder(folder)
    except OSError as exc:
        raise _refused(folder, exc) from exc


def save(up: UpCluster) -> None:
    """Writes the file, readable by the user alone; complete or not at all. Raises ResourceError."""
    folder = state_folder()
    try:
        private_folder(folder)
        aside = folder / f"{up.name}.json.new"
        aside.touch(mode=0o600)
        aside.write_text(json.dumps(dataclasses.asdict(up), indent=1))
        aside.rename(_file(up.name))
    except OSError as exc:
        raise _refused(folder, exc) from exc


def load(name: str) -> UpCluster | None:
    """The cluster of that name, if `up` noted one. Raises ResourceError for a file that cannot be read."""
    file = _file(name)
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        if exc.errno == errno.ENAMETOOLONG:
            return None  # no name of a cluster that could be noted
        raise ResourceError(f"{file} cannot be read ({exc.strerror}); set XDG_STATE_HOME as it was for `up`") from exc
    try:
        fields = json.loads(file.read_text())
        local = fields.pop("local_ray")
        # Files of clusters with a single router name just that.
        routers = tuple(fields.pop("router_addresses", ())) or (fields.pop("router_address"),)
        return UpCluster(**fields, router_addresses=routers, local_ray=LocalRay(**local) if local else None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ResourceError(f"{file} cannot be read ({exc}); remove it if no cluster {name} is up") from exc


def forget(name: str) -> None:
    """Removes the file and the secret; fine if there is none."""
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


def _file(name: str) -> Path:
    return state_folder() / f"{name}.json"
