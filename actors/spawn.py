"""Starts the named, detached actors of a cluster."""

from collections.abc import Collection
from functools import cache
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.names import options
from moecluster.config import Config

NODE_LABEL = "ray.io/node-id"


def spawn(
    shell: type,
    role: str,
    config: Config,
    name: str,
    *arguments: Any,
    avoid_nodes: Collection[str] = (),
    node: str = "",
    near: str = "",
) -> "ActorHandle[Any]":
    """Starts a detached actor in the cluster's namespace, or finds it. It stays pending until Ray has room for it.

    role: expert, router, controller or source. Ray restarts all of them without limit; they rebuild their state.
    Expert actors are spread over the nodes, so that the loss of one costs least.
    avoid_nodes: ids of Ray nodes to exclude; node: id of the only node allowed; near: of the one to be preferred to
    all others, unless it can never have room.
    """
    selector = node or (f"!in({','.join(avoid_nodes)})" if avoid_nodes else "")
    placed: dict[str, Any] = {"label_selector": {NODE_LABEL: selector}} if selector else {}
    if near:
        placed["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id=near, soft=True)
    elif role == "expert":
        placed["scheduling_strategy"] = "SPREAD"
    handle: ActorHandle[Any] = (
        _actor_class(shell)
        .options(
            name=name,
            namespace=config.cluster.name,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=4,
            **placed,
            **options(config, role),
        )
        .remote(*arguments)
    )
    return handle


@cache
def _actor_class(shell: type) -> Any:
    """Returns Ray's class for a shell, once: Ray keeps each that it makes."""
    return ray.remote(shell)
