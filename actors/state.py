"""What is up: one small file per cluster in the user's state directory, so that later commands find it."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from actors.local_ray import LocalRay
from moecluster.errors import ResourceError


@dataclass(frozen=True, kw_only=True)
class UpCluster:
    """A cluster that `up` started."""

    name: str
    ray_address: str
    model: str  # the directory that it serves
    router_addresses: tuple[str, ...]  # when this was noted; a router that was started again listens elsewhere
    controller_address: str
    local_ray: LocalRay | None  # None: the Ray cluster is not ours to end

    @property
    def router_address(self) -> str:
        """Of the first router."""
        return self.router_addresses[0]


def state_folder() -> Path:
    """$XDG_STATE_HOME/moecluster, by default ~/.local/state/moecluster."""
    root = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(root) / "moecluster"


def save(up: UpCluster) -> None:
    """Writes the file, readable by the user alone; complete or not at all."""
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = folder / f"{up.name}.json.new"
    aside.touch(mode=0o600)
    aside.write_text(json.dumps(dataclasses.asdict(up), indent=1))
    aside.rename(_file(up.name))


def load(name: str) -> UpCluster | None:
    """The cluster of that name, if `up` noted one. Raises ResourceError for a file that cannot be read."""
    file = _file(name)
    if not file.is_file():
        return None
    try:
        fields = json.loads(file.read_text())
        local = fields.pop("local_ray")
        # Files of clusters with a single router name just that.
        routers = tuple(fields.pop("router_addresses", ())) or (fields.pop("router_address"),)
        return UpCluster(**fields, router_addresses=routers, local_ray=LocalRay(**local) if local else None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ResourceError(f"{file} cannot be read ({exc}); remove it if no cluster {name} is up") from exc


def forget(name: str) -> None:
    """Removes the file; fine if there is none."""
    _file(name).unlink(missing_ok=True)


def _file(name: str) -> Path:
    return state_folder() / f"{name}.json"
