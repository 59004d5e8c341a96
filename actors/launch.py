"""Bringing a whole cluster up and down, the Ray under it included; what is up is noted for later commands.

Ray reads its authentication from the environment once, when it is imported. So nothing here imports it (or the driver)
before `join` has set that.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from actors import state
from actors.local_ray import LocalRay, ray_environment, start_local_ray, stop_local_ray
from actors.settings import OnLoading
from actors.state import UpCluster
from moecluster.config import Config
from moecluster.errors import ResourceError
from moecluster.rpc.credentials import ClusterCredentials, read_secret, secret_path, write_secret

if TYPE_CHECKING:
    from actors.driver import Cluster


def bring_up(config: Config, model_dir: str, on_loading: OnLoading | None = None) -> UpCluster:
    """Starts Ray, if no address of one is given, and the cluster on it. Raises UserError, with nothing left behind."""
    name = config.cluster.name
    noted = state.load(name)
    if noted is not None:
        raise ResourceError(
            f"the cluster {name} is up already and serves {noted.model}; "
            "take it down first (moecluster down), or give this one another cluster.name"
        )
    state.check()
    _refuse_wrong_model(model_dir)
    local = None if config.cluster.address else start_local_ray(config.security.ray_auth)
    credentials = ClusterCredentials.make()
    address = local.address if local is not None else config.cluster.address
    try:
        write_secret(secret_path(name), credentials)
        cluster = join(name, address, local)
        cluster.start(config, model_dir, on_loading, credentials=credentials)
        up = UpCluster(
            name=name,
            ray_address=address,
            model=model_dir,
            router_addresses=cluster.router_addresses(),
            controller_address=cluster.controller_address(),
            secret_file=str(secret_path(name)),
            local_ray=local,
        )
        state.save(up)
        leave()
    except BaseException:
        if local is not None:
            stop_local_ray(local)
        secret_path(name).unlink(missing_ok=True)
        raise
    return up


def credentials_of(up: UpCluster) -> ClusterCredentials | None:
    """What the cluster asks for, from its file; if that is gone, from its controller, whom Ray lets us reach.

    None for a cluster that asks for none. Raises UserError.
    """
    if not up.secret_file:
        return None
    if not Path(up.secret_file).exists():
        try:
            found = join(up.name, up.ray_address, up.local_ray).credentials()
        finally:
            leave()
        write_secret(Path(up.secret_file), found)
    return read_secret(up.secret_file)


def take_down(up: UpCluster) -> None:
    """Ends what bring_up started, and nothing else."""
    if up.local_ray is not None:
        stop_local_ray(up.local_ray)
    else:
        join(up.name, up.ray_address, None).stop()
        leave()
    state.forget(up.name)


def join(name: str, address: str, local: LocalRay | None) -> "Cluster":
    """The cluster of a name, with this process as a driver of its Ray. Raises ResourceError."""
    if local is not None:
        os.environ.update(ray_environment(local))
    from actors.driver import Cluster, connect

    connect(address)
    return Cluster(name)


def leave() -> None:
    """This process is no driver any more; the cluster goes on."""
    from actors.driver import disconnect

    disconnect()


def _refuse_wrong_model(model_dir: str) -> None:
    """Raises CheckpointError or UnsupportedModelError, before anything is started."""
    # Brings transformers along, which takes seconds: only where a cluster is really started.
    from moecluster.models.usable import refuse_unusable

    refuse_unusable(model_dir)
