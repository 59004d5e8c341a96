"""Brings a whole cluster up and down, including the Ray under it; records what is up for later commands.

Ray reads its authentication from the environment once, when it is imported. So nothing here imports Ray (or the driver)
before `join` has set it.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from actors import cluster_file
from actors.cluster_file import Start, UpCluster
from actors.local_ray import (
    LocalRay,
    is_gone,
    patience,
    plan_local_ray,
    ray_environment,
    start_local_ray,
    stop_local_ray,
)
from actors.names import OnLoading
from actors.process_start import start_ticks
from actors.signals import undisturbed
from moecluster.config import Config
from moecluster.config.sections import ClusterConfig
from moecluster.errors import MoeClusterError, ResourceError
from moecluster.rpc.credentials import ClusterCredentials, secret_path, secret_to_start_with, write_secret
from moecluster.rpc.tls.material import TlsFiles, read_material

if TYPE_CHECKING:
    from actors.driver import Cluster

END_START_TIMEOUT_S = 30.0  # a start that is signaled cleans up first
POLL_S = 0.1


def bring_up(config: Config, model_dir: str, on_loading: OnLoading | None = None) -> UpCluster:
    """Starts Ray, unless an address is given, and the cluster on it. Raises UserError, with nothing left behind.

    If this process is killed at any moment, the file records what exists by then, for `end_start`.
    """
    name = config.cluster.name
    _refuse_second(name)
    cluster_file.check()
    if config.security.tls_folder:
        read_material(TlsFiles.in_folder(config.security.tls_folder))  # raises ConfigError, before anything is started
    credentials = secret_to_start_with(cluster=name, tls_dir=config.security.tls_folder)  # raises ConfigError
    _refuse_wrong_model(model_dir)
    with cluster_file.start_lock(name) as ours:
        if not ours:
            raise ResourceError(_under_way(name))
        _refuse_second(name)
        broken = cluster_file.load_start(name)
        if broken is not None:
            _clear(broken)
        start = _plan(config, model_dir)
        cluster_file.save(start)
        try:
            up = _start(config, start, credentials, on_loading)
            cluster_file.save(up)
        except BaseException:
            with undisturbed(), suppress(MoeClusterError):  # on failure the file stays, for moecluster down
                _clear(start)
            raise
    return up


def credentials_of(up: UpCluster) -> ClusterCredentials | None:
    """Returns the cluster's credentials from its file; if that is gone, from its controller, reached over Ray.

    None for a cluster without a secret. Raises UserError.
    """
    if not up.secret_file:
        return None
    if not Path(up.secret_file).exists():
        try:
            found = join(up.name, up.ray_address, up.local_ray).credentials()
        finally:
            leave()
        write_secret(Path(up.secret_file), found)
    return up.read_credentials()


def give_directory(up: UpCluster, directory: str) -> None:
    """Allows requests to a cluster to name this directory, over its Ray. Raises ResourceError, Unavailable."""
    try:
        join(up.name, up.ray_address, up.local_ray).give_directory(directory)
    finally:
        leave()


def take_down(up: UpCluster) -> None:
    """Stops what bring_up started, and nothing else."""
    _end(up.name, up.ray_address, up.local_ray)
    cluster_file.forget(up.name)


def end_start(name: str) -> None:
    """Stops a start, in progress or broken off, and what it started; nothing if it completed. Raises ResourceError."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with cluster_file.start_lock(name) as ours:
            start = cluster_file.load_start(name)
            if start is None:
                return
            if ours:
                _clear(start)
                return
        _signal_starter(start, number)
        deadline_s = time.monotonic() + END_START_TIMEOUT_S
        while cluster_file.is_starting(name) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
    with cluster_file.start_lock(name) as ours:
        start = cluster_file.load_start(name)
        if start is not None and not ours:
            raise ResourceError(f"process {start.pid}, which starts the cluster {name}, does not end; end it first")
        if start is not None:
            _clear(start)


def message_of_start(start: Start) -> str:
    """Returns a message on a start's state, and what to type."""
    if cluster_file.is_starting(start.name):
        return _under_way(start.name)
    return (
        f"the start of the cluster {start.name} was broken off (process {start.pid} has ended): "
        f"{_typed('down', start.name)} ends what is left of it, moecluster up starts it anew"
    )


def join(name: str, address: str, local: LocalRay | None) -> "Cluster":
    """Joins the cluster's Ray as a driver, and returns the cluster. Raises ResourceError."""
    if local is not None:
        os.environ.update(ray_environment(local))
    from actors.driver import Cluster
    from actors.joining import connect

    connect(address)
    return Cluster(name)


def leave() -> None:
    """Leaves Ray as a driver; the cluster goes on."""
    from actors.joining import disconnect

    disconnect()


def _refuse_second(name: str) -> None:
    noted = cluster_file.load(name)
    if noted is not None:
        raise ResourceError(
            f"the cluster {name} is up already and serves {noted.model}; "
            f"take it down first ({_typed('down', name)}), or give this one another cluster.name"
        )


def _under_way(name: str) -> str:
    start = cluster_file.load_start(name)
    who = f" by process {start.pid}" if start is not None else ""
    return f"the cluster {name} is being started{who}: wait for it, or end the start with {_typed('down', name)}"


def _typed(command: str, name: str) -> str:
    return f"moecluster {command}" + (f" --name {name}" if name != ClusterConfig().name else "")


def _plan(config: Config, model_dir: str) -> Start:
    pid = os.getpid()
    started = start_ticks(pid)
    assert started is not None, "this process is there"
    return Start(
        name=config.cluster.name,
        ray_address=config.cluster.address,
        model=model_dir,
        pid=pid,
        pid_start_ticks=started,
        local_ray=None if config.cluster.address else plan_local_ray(config.security.ray_auth),
    )


def _start(config: Config, start: Start, credentials: ClusterCredentials, on_loading: OnLoading | None) -> UpCluster:
    local = start.local_ray and start_local_ray(start.local_ray, config.cluster.start_timeout_s)
    address = local.address if local is not None else start.ray_address
    os.environ.update({**patience(config.cluster.start_timeout_s), **os.environ})
    write_secret(secret_path(start.name), credentials)
    cluster = join(start.name, address, local)
    cluster.start(config, start.model, on_loading, credentials=credentials)
    up = UpCluster(
        name=start.name,
        ray_address=address,
        model=start.model,
        router_addresses=cluster.router_addresses(),
        controller_address=cluster.controller_address(),
        secret_file=str(secret_path(start.name)),
        tls_dir=credentials.tls_dir,
        local_ray=local,
    )
    leave()
    return up


def _clear(start: Start) -> None:
    """Stops what a start, whose lock is held, has started, and forgets it."""
    _end(start.name, start.ray_address, start.local_ray)
    cluster_file.forget(start.name)


def _end(name: str, ray_address: str, local: LocalRay | None) -> None:
    """Stops a cluster: the whole Ray if it is local, else the actors of its namespace."""
    if local is not None:
        stop_local_ray(local)
    elif not is_gone(ray_address):  # if it is gone, so are its actors
        join(name, ray_address, None).stop()
        leave()


def _signal_starter(start: Start, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        process = os.pidfd_open(start.pid)  # so that the signal reaches the process that is looked at
        try:
            if start_ticks(start.pid) == start.pid_start_ticks:
                signal.pidfd_send_signal(process, number)
        finally:
            os.close(process)


def _refuse_wrong_model(model_dir: str) -> None:
    """Raises CheckpointError or UnsupportedModelError, before anything is started."""
    # Imports transformers, which takes seconds: only where a cluster is really started.
    from moecluster.models.usable import refuse_unusable

    refuse_unusable(model_dir)
