"""Settings of the section [cluster]."""

import re
from dataclasses import dataclass
from typing import ClassVar

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
    host: str = setting("127.0.0.1", "Address that the gRPC and metrics servers of all actors listen on.")
    metrics_port: int = setting(
        0,
        "Port of the first router's `/metrics`; the other routers, the controller and the expert actors use the "
        "ports after it. 0: every actor uses any free port.",
        minimum=0,
        maximum=65535,
    )
    max_expert_series: int = setting(
        1024,
        "Series of one per-expert metric that a process exports. With more experts it exports those with the "
        "highest values, and quantiles over all. 0: quantiles only.",
        minimum=0,
    )
    start_timeout_s: float = setting(
        120.0, "Deadline for all actors to be ready, and for one actor to load its experts.", above=0
    )

    def check(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", self.name):
            raise self.complain("name", "expected up to 63 letters, digits, dots, dashes and underscores")
