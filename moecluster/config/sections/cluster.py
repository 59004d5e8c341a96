"""Settings of the section [cluster]."""

import re
from dataclasses import dataclass
from typing import ClassVar

from moecluster.addresses import HOST_FORM, PortRange, is_host
from moecluster.config.fields import Section, setting


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Section):
    """Size of the cluster, and where its processes run."""

    section: ClassVar[str] = "cluster"

    name: str = setting(
        "moecluster",
        "Name of the cluster: its Ray namespace and the `cluster` label of its metrics. One cluster serves one model.",
    )
    address: str = setting("", "Address of a running Ray cluster. Empty: the local Ray, started if there is none.")
    num_expert_actors: int = setting(4, "Expert actors to start.", minimum=1)
    num_routers: int = setting(1, "Routers to start. Each router reaches all experts.", minimum=1)
    cpus_per_expert_actor: float = setting(0.25, "CPUs that Ray reserves for each expert actor.", minimum=0)
    gpus_per_expert_actor: float = setting(
        0.0, "GPUs that Ray reserves for each expert actor; experts compute on the CPU in any case.", minimum=0
    )
    cpus_per_router: float = setting(0.5, "CPUs that Ray reserves for each router.", minimum=0)
    gpus_per_router: float = setting(
        0.0, "GPUs that Ray reserves for each router. Above 0, the trunk computes on a GPU if there is one.", minimum=0
    )
    host: str = setting(
        "",
        "Address that the gRPC and metrics servers of all actors listen on. Empty: each listens on its node's address "
        "as Ray knows it, which is 127.0.0.1 on a local Ray. 0.0.0.0 or ::: all addresses of the node. Another address "
        "is one host's, and refused if Ray has several nodes. Others reach an actor by its node's address, or by "
        "`MOECLUSTER_ADVERTISED_HOST` in the environment of the node's Ray.",
    )
    port_range: str = setting(
        "",
        "Ports that the servers of all actors listen on, such as 20000-20999: each takes a free one for gRPC, and one "
        "for `/metrics` without cluster.metrics_port. For firewalls between hosts. Empty: any free ports.",
    )
    controller_port: int = setting(
        0,
        "Port of the controller's gRPC, so that `--address HOST:PORT` of commands on other hosts can be written down. "
        "0: any port (of cluster.port_range).",
        minimum=0,
        maximum=65535,
    )
    metrics_port: int = setting(
        0,
        "Port of the first router's `/metrics`; the other routers, the controller and the expert actors use the "
        "ports after it. 0: every actor uses any free port (of cluster.port_range).",
        minimum=0,
        maximum=65535,
    )
    directories: tuple[str, ...] = setting(
        (),
        "Directories that requests may name, with all below them: weights to update to, and text, models and outputs "
        "of training runs that other hosts ask for (`--address`). Beside those that `up`, `update` and `train` give.",
    )
    max_expert_series: int = setting(
        1024,
        "Series of one per-expert metric that a process exports. With more experts it exports the 64 hottest and the "
        "64 coldest, and quantiles over all. 0: quantiles only.",
        minimum=0,
    )
    start_timeout_s: float = setting(
        120.0, "Deadline for all actors to be ready, and for one actor to load its experts.", above=0
    )

    def check(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", self.name):
            raise self.complain("name", "expected up to 63 letters, digits, dots, dashes and underscores")
        if self.host and not is_host(self.host):
            raise self.complain("host", f"expected {HOST_FORM}, or an empty string")
        try:
            PortRange.parse(self.port_range or "1-1")
        except ValueError:
            raise self.complain("port_range", "expected FIRST-LAST, such as 20000-20999, or an empty string") from None
        metrics_ports = range(self.metrics_port, self.metrics_port + self.num_routers + 1 + self.num_expert_actors)
        if self.metrics_port and self.controller_port in metrics_ports:
            raise self.complain(
                "controller_port", f"expected one that no /metrics takes: {metrics_ports[0]} to {metrics_ports[-1]}"
            )
