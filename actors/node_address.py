"""Where the processes of a node listen, and the address by which others reach them.

Both are found on the node itself, in each incarnation of an actor: Ray may restart it elsewhere.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace

import ray

from actors.names import Endpoints, fixed_ports
from moecluster.addresses import HOST_FORM, ListenAddress, PortRange, is_host, is_wildcard
from moecluster.config import Config
from moecluster.config.sections import ClusterConfig
from moecluster.errors import ConfigError
from moecluster.rpc.server import RunningServer
from moecluster.types import ProcessInfo

ADVERTISED_HOST_VARIABLE = "MOECLUSTER_ADVERTISED_HOST"
METRICS_PORT = "cluster.metrics_port"
CONTROLLER_PORT = "cluster.controller_port"


def listen_address(config: Config) -> ListenAddress:
    """Returns where a process of this node listens, on any free port of cluster.port_range that no setting gives to
    somebody. This process must have joined Ray, unless cluster.host names one address.

    Raises ConfigError for a wrong $MOECLUSTER_ADVERTISED_HOST.
    """
    found = resolve(config.cluster.host, os.environ.get(ADVERTISED_HOST_VARIABLE, ""), ray.util.get_node_ip_address)
    if not config.cluster.port_range:
        return found
    return replace(found, ports=replace(PortRange.parse(config.cluster.port_range), reserved=fixed_ports(config)))


def resolve(host: str, advertised_host: str, node_host: Callable[[], str]) -> ListenAddress:
    """host: cluster.host. advertised_host: as the node's environment has it, or empty. node_host: returns the node's
    address as Ray knows it. Raises ConfigError."""
    if advertised_host and (not is_host(advertised_host) or is_wildcard(advertised_host)):
        raise ConfigError(
            f'{ADVERTISED_HOST_VARIABLE}: got "{advertised_host}", expected {HOST_FORM}, by which other nodes reach '
            "this one"
        )
    if not host:
        return ListenAddress(host=node_host(), advertised_host=advertised_host)
    if is_wildcard(host):
        return ListenAddress(host=host, advertised_host=advertised_host or node_host())
    return ListenAddress(host=host, advertised_host=advertised_host)


def own_endpoints(actor: str, server: RunningServer, metrics_address: str = "") -> Endpoints:
    """Returns the addresses of this process, which has joined Ray."""
    return Endpoints(
        actor=actor,
        pid=os.getpid(),
        address=server.address,
        metrics_address=metrics_address,
        server_id=server.id,
        node=ray.util.get_node_ip_address(),
        node_id=ray.get_runtime_context().get_node_id(),
    )


def own_process(metrics_address: str) -> ProcessInfo:
    """Returns what operators want to know of this process, which has joined Ray."""
    return ProcessInfo(
        pid=os.getpid(), node=ray.util.get_node_ip_address(), metrics_address=metrics_address, nice=os.nice(0)
    )


def refuse_host_of_one_node(cluster: ClusterConfig, node_hosts: Iterable[str]) -> None:
    """Raises ConfigError if cluster.host is the address of one host, and Ray has several. node_hosts: the addresses of
    Ray's nodes."""
    others = sorted({host for host in node_hosts if host != cluster.host})
    if not cluster.host or is_wildcard(cluster.host) or len(set(node_hosts)) < 2 or not others:
        return
    shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    raise cluster.complain(
        "host",
        f"which is one host's address, and Ray has nodes at {shown}; leave it empty, and each process listens on its "
        "node's address, or take 0.0.0.0 (or ::) for all addresses of each node",
    )
