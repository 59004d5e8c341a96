"""Finds the routers of a running cluster."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from actors import cluster_file
from actors.cluster_file import UpCluster
from actors.launch import join, leave
from moecluster.errors import Unavailable

if TYPE_CHECKING:
    from actors.driver import Cluster

PATIENCE_S = 60.0  # a router's process imports torch and transformers, and loads the trunk
RETRY_S = 0.5


def find_routers(cluster: UpCluster, console: Console) -> tuple[str, ...]:
    """Returns the routers' current addresses from Ray. Joining takes seconds: only when the recorded ones are stale."""
    console.print("no router answers where it was; asking Ray where they are now")
    joined = join(cluster.name, cluster.ray_address, cluster.local_ray)
    try:
        addresses = _wait_for_routers(joined)
    finally:
        leave()
    noted = cluster_file.load(cluster.name)
    if noted is not None:  # otherwise it was taken down meanwhile
        cluster_file.save(replace(noted, router_addresses=addresses))
    return addresses


def _wait_for_routers(cluster: "Cluster") -> tuple[str, ...]:
    """Waits while Ray restarts lost routers. Raises Unavailable if none is back in time."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return cluster.router_addresses()
        except Unavailable:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(RETRY_S)
