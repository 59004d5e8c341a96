"""A real Ray with its own autoscaler (version 1), whose nodes are processes of this host.

Its start ends every Ray process that it sees: only in a namespace of its own (tests/support/hosts/namespace.py).
"""

import contextlib
import io
from typing import Any

import psutil
import ray
from ray.cluster_utils import AutoscalingCluster

from tests.support.autoscaling.node_provider import NODE_ID

GCS_ADDRESS = "127.0.0.1:6379"
IDLE_MINUTES = 0.07  # of a node, until the autoscaler takes it
HEAD_TYPE, WORKER_TYPE = "ray.head.default", "worker"
LISTS = (  # of a cluster file, which have nothing to say here
    *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands"),
    *("head_setup_commands", "head_start_ray_commands", "worker_setup_commands", "worker_start_ray_commands"),
)
OBJECT_STORE_BYTES = 80 * 10**6


class AutoscaledRay(AutoscalingCluster):
    """Joined from __enter__ to __exit__."""

    def __init__(self, *, head_cpus: int, worker_cpus: int, max_workers: int, grace_s: float) -> None:
        """grace_s: between the SIGTERM to a worker node and its end, for its actors to leave."""
        self._grace_s = grace_s
        super().__init__(
            {"CPU": head_cpus, "object_store_memory": OBJECT_STORE_BYTES},
            {WORKER_TYPE: {"resources": {"CPU": worker_cpus}, "node_config": {}, "min_workers": 0,
                           "max_workers": max_workers}},
        )  # fmt: skip

    def _generate_config(
        self, head_resources: Any, worker_node_types: Any, autoscaler_v2: Any = False, **config_kwargs: Any
    ) -> dict[str, Any]:
        """Returns what example.yaml, which Ray's wheel lacks, would give."""
        head = {"resources": dict(head_resources), "node_config": {}, "max_workers": 0}
        return {
            "cluster_name": "autoscaled",
            "max_workers": sum(kind["max_workers"] for kind in worker_node_types.values()),
            "provider": {
                "type": "external",
                "module": "tests.support.autoscaling.node_provider.BlockingNodeProvider",
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "gcs_address": GCS_ADDRESS,
            },
            "available_node_types": {HEAD_TYPE: head, **worker_node_types},
            "head_node_type": HEAD_TYPE,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": IDLE_MINUTES,
            **{key: {} for key in ("auth", "docker", "file_mounts")},
            **{key: [] for key in LISTS},
            "file_mounts_sync_continuously": False,
        }

    def __enter__(self) -> "AutoscaledRay":
        self.start(
            override_env={
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(self._grace_s),
                "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "5",  # a node that ended by itself is forgotten then
            }
        )
        ray.init(address=GCS_ADDRESS, log_to_driver=False)
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()
        with contextlib.redirect_stdout(io.StringIO()):
            self.shutdown()


def living_nodes() -> set[str]:
    """Returns the ids of the nodes that Ray counts as alive."""
    return {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}


def first_process_of(node: str) -> psutil.Process:
    """Returns the `ray start --block` of a worker node."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "--block" in process.cmdline() and process.environ().get(NODE_ID) == node:
                return process
    raise AssertionError(f"node {node} has no first process")
