"""Nodes for Ray's autoscaler, all on this host: each is a `ray start --block`, as the first process of a pod is, and
ends by SIGTERM, as Kubernetes ends a pod.

Ray's own fake provider makes a node of the autoscaler's own children, which know no SIGTERM with a grace period.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"  # in the environment of a node's processes
ANY_PORT = ("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0", "--disable-usage-stats")
OBJECT_STORE = "--object-store-memory=80000000"


class BlockingNodeProvider(FakeMultiNodeProvider):
    """Creates and ends nodes; everything else is the fake provider's."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Mapping[str, str], count: int, resources: Mapping[str, float], labels: Any
    ) -> None:
        with self.lock:
            name = self._next_hex_node_id()
            node_type = tags[TAG_RAY_USER_NODE_TYPE]
            process = subprocess.Popen(
                [
                    *(str(Path(sys.prefix) / "bin" / "ray"), "start", "--block", f"--address={self._gcs_address}"),
                    *(f"--num-cpus={int(resources.get('CPU', 0))}", *ANY_PORT, OBJECT_STORE),
                ],
                env={
                    **os.environ,
                    NODE_ID: name,
                    "RAY_CLOUD_INSTANCE_ID": name,
                    "RAY_NODE_TYPE_NAME": node_type,
                    "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": int(resources.get("CPU", 0))}),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            threading.Thread(target=process.wait, daemon=True).start()  # leaves no zombie
            nodes: dict[str, dict[str, Any]] = self._nodes
            nodes[name] = {
                "tags": {
                    TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                    TAG_RAY_USER_NODE_TYPE: node_type,
                    TAG_RAY_NODE_NAME: name,
                    TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
                    **tags,
                },
                "process": process,
            }

    def _terminate_node(self, node: Mapping[str, Any]) -> None:
        process: subprocess.Popen[bytes] = node["process"]
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
