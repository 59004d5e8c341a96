"""Checks before a cluster is started: what Ray has, and what the settings ask for."""

from collections.abc import Mapping
from typing import Any

import ray

from actors.names import metrics_ports
from actors.node_address import CONTROLLER_PORT, METRICS_PORT, listen_address, refuse_host_of_one_node
from moecluster.addresses import ListenAddress
from moecluster.config import Config
from moecluster.errors import ResourceError


def check(config: Config) -> None:
    """Raises UserError if Ray lacks CPUs or GPUs, or the addresses or ports of the settings do not fit its nodes."""
    nodes = _nodes()
    refuse_host_of_one_node(config.cluster, [str(node["NodeManagerAddress"]) for node in nodes])
    check_resources(config, ray.available_resources())
    if len(nodes) == 1:  # else an actor may land where the port is free
        check_ports(config, listen_address(config))


def check_resources(config: Config, available: Mapping[str, float]) -> None:
    """Raises ResourceError naming the missing CPUs or GPUs. available: Ray's free resources, by Ray's names."""
    cluster = config.cluster
    needed = {
        "CPU": cluster.num_expert_actors * cluster.cpus_per_expert_actor
        + cluster.num_routers * cluster.cpus_per_router,
        "GPU": cluster.num_expert_actors * cluster.gpus_per_expert_actor
        + cluster.num_routers * cluster.gpus_per_router,
    }
    missing = {kind: count - available.get(kind, 0.0) for kind, count in needed.items()}
    short = [f"{count:g} {kind}s" for kind, count in missing.items() if count > 1e-6]
    if short:
        free = ", ".join(f"{available.get(kind, 0.0):g} {kind}s" for kind, count in needed.items() if count)
        routers = "the router" if cluster.num_routers == 1 else f"{cluster.num_routers} routers"
        raise ResourceError(
            f"{' and '.join(short)} are missing: {cluster.num_expert_actors} expert actors and {routers} need "
            f"{', '.join(f'{count:g} {kind}s' for kind, count in needed.items() if count)}, free are {free}; "
            "lower cluster.num_expert_actors, cluster.num_routers or the CPUs and GPUs per actor, or add nodes"
        )


def has_other_nodes(config: Config) -> bool:
    """Returns whether actors may run on nodes without the checkpoint: a Ray given by address may grow nodes."""
    return bool(config.cluster.address) or len(_nodes()) > 1


def check_ports(config: Config, listen: ListenAddress) -> None:
    """Raises ResourceError if a port that the settings name is in use on this node."""
    wanted = [(f"{name}'s /metrics", METRICS_PORT, port) for name, port in metrics_ports(config).items()]
    wanted.append(("the controller", CONTROLLER_PORT, config.cluster.controller_port))
    for what, setting, port in wanted:
        if not port:
            continue
        try:
            listen.probe(port)
        except OSError as exc:
            raise ResourceError(
                f"port {port} of {listen.host} is in use, and {what} wants it; choose another {setting}, or 0 for any"
            ) from exc


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]
