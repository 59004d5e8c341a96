"""Names, ports, resources and environments of the actors' processes."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moecluster.config import Config
from moecluster.metrics import Metrics

CONTROLLER = "controller"
ROUTER = "router"  # the first router: training runs there
EXPERT_PREFIX = "expert-"
ORDERED_GROWTH = 4  # default limit of scaling by command: a typo must not start hundreds of processes
SOURCE = "checkpoint-source"  # serves the checkpoint of `up` to other nodes, if there are any

# Ray gives this resource to its head. The controller runs there: no autoscaler takes the head away.
HEAD_RESOURCE = "node:__internal_head__"
HEAD_PART = 0.001

OnLoading = Callable[[int, int], None]  # called with the bytes of experts loaded, and the total


def router_names(config: Config) -> tuple[str, ...]:
    """Returns the names of the routers, in order: router, router-1, ..."""
    return (ROUTER, *(f"{ROUTER}-{i}" for i in range(1, config.cluster.num_routers)))


def most_routers(config: Config) -> int:
    """Returns the largest number of routers at any time."""
    return max(config.serve.max_routers or ORDERED_GROWTH * config.cluster.num_routers, config.cluster.num_routers)


def most_expert_actors(config: Config) -> int:
    """Returns the largest number of expert actors at any time."""
    return config.controller.max_expert_actors or ORDERED_GROWTH * config.cluster.num_expert_actors


def is_router(actor: str) -> bool:
    """Returns whether an actor's name is a router's."""
    return actor == ROUTER or actor.startswith(f"{ROUTER}-")


def is_source(actor: str) -> bool:
    """Returns whether an actor serves checkpoints of its node: the first one's node is that of `up`."""
    return actor == SOURCE or actor.startswith(f"{SOURCE}-")


def expert_names(config: Config) -> tuple[str, ...]:
    """Returns the names of the expert actors, in order."""
    return tuple(f"{EXPERT_PREFIX}{i}" for i in range(config.cluster.num_expert_actors))


def make_metrics(config: Config) -> Metrics:
    """Returns the metrics of an actor's process. Without serve.model_name the model is named after the cluster."""
    return Metrics(
        model=config.serve.model_name or config.cluster.name,
        cluster=config.cluster.name,
        max_expert_series=config.cluster.max_expert_series,
    )


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    """Addresses of an actor's process."""

    actor: str
    pid: int
    address: str  # gRPC, host:port
    metrics_address: str  # /metrics, host:port
    server_id: str = ""  # of its RunningServer
    node: str = ""  # the address of its node, as Ray knows it
    node_id: str = ""  # its node, by Ray's id
    nice: int = field(default_factory=lambda: os.nice(0))  # niceness of the process that creates this record


def metrics_ports(config: Config) -> dict[str, int]:
    """Returns actor -> port of its /metrics: the first router's is cluster.metrics_port, others follow; 0: any port."""
    names = (*router_names(config), CONTROLLER, *expert_names(config))
    first = config.cluster.metrics_port
    return {name: first + i if first else 0 for i, name in enumerate(names)}


def metrics_port(config: Config, actor: str) -> int:
    """Returns the port of one actor's /metrics. Actors that join later get the next ports: first all routers up to
    most_routers, then expert actors. One that replaces a leaving one beyond the limit has any (0)."""
    ports = metrics_ports(config)
    if actor in ports or not config.cluster.metrics_port:
        return ports.get(actor, 0)
    cluster, next_port = config.cluster, max(ports.values()) + 1
    if is_router(actor):
        number = int(actor.removeprefix(f"{ROUTER}-"))
        return next_port + number - cluster.num_routers if number < most_routers(config) else 0
    next_port += most_routers(config) - cluster.num_routers
    number = int(actor.removeprefix(EXPERT_PREFIX))
    return next_port + number - cluster.num_expert_actors if number < most_expert_actors(config) else 0


def fixed_ports(config: Config) -> frozenset[int]:
    """Returns the ports that settings give to an actor, now or when it joins later."""
    ports = {config.cluster.controller_port}
    if config.cluster.metrics_port:
        most = most_routers(config) + 1 + most_expert_actors(config)
        ports.update(range(config.cluster.metrics_port, config.cluster.metrics_port + most))
    return frozenset(ports - {0})


def process_environment(threads: int) -> dict[str, str]:
    """Returns the environment of an actor's process."""
    return {
        "OMP_NUM_THREADS": str(threads),
        # Idle OpenMP threads of one process must not spin on the cores of another.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        # malloc returns free memory at the end of its first arena only; experts that moved away would leave more.
        "MALLOC_ARENA_MAX": "1",
        # oneDNN, and torch above it, each cache 0.3 MB of compiled kernel per number of rows that a weight of one shape
        # sees, 1,024 of them by default: hundreds of megabytes under a varying load.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "LRU_CACHE_CAPACITY": "16",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PROMETHEUS_DISABLE_CREATED_SERIES": "true",
    }


def options(config: Config, role: str) -> dict[str, Any]:
    """Returns Ray's resources and environment for an actor of a role: expert, router, controller or source."""
    cluster = config.cluster
    resources = {HEAD_RESOURCE: HEAD_PART} if role == "controller" else {}
    cpus, gpus, threads = {
        "expert": (cluster.cpus_per_expert_actor, cluster.gpus_per_expert_actor, config.experts.threads),
        "router": (cluster.cpus_per_router, cluster.gpus_per_router, config.router.threads),
        "controller": (0.0, 0.0, 1),
        "source": (0.0, 0.0, 1),
    }[role]
    return {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "resources": resources,
        "runtime_env": {"env_vars": process_environment(threads)},
    }
