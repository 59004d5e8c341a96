"""A served model on an autoscaled Ray, from the outside: its gateway's process, its actors, nodes and operations."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from actors.names import CONTROLLER, is_router
from moecluster.errors import MoeClusterError
from moecluster.rpc.controller.client import ControllerCalls
from moecluster.rpc.credentials import write_secret
from moecluster.types import ActorPhase, ControllerStatus, Operation, OperationKind
from tests.support.autoscaling.autoscaled_ray import GCS_ADDRESS, living_nodes
from tests.support.clusters.ray_cluster import CREDENTIALS, RayCluster, wait_for_result

HEAD_CPUS, WORKER_CPUS, MAX_WORKERS = 3, 3, 3  # the head: two expert actors and a router; a worker node the same
FEWEST, MOST = 2, 4  # expert actors
CONTROLLER_PORT, HTTP_PORT = 20000, 8000
URL = f"http://127.0.0.1:{HTTP_PORT}"
MODEL = "tiny"
SETTINGS: dict[str, Any] = {
    "cluster": {
        "address": GCS_ADDRESS,
        "num_expert_actors": FEWEST,
        "cpus_per_expert_actor": 1.0,
        "cpus_per_router": 1.0,
        "controller_port": CONTROLLER_PORT,
    },
    "controller": {
        "slots_per_layer": 3,
        "period_s": 0.5,
        "window_s": 5.0,
        "lease_s": 3.0,
        "min_expert_actors": FEWEST,
        "max_expert_actors": MOST,
        "target_utilization": 0.06,  # the router takes most of the time of so small a model
        "target_queue_s": 10.0,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 3.0,
    },
    "serve": {"max_routers": 2, "max_running": 64},
}
CHANGE_S = 120.0  # longest wait for one change of the cluster
GATEWAY = (sys.executable, "-c", "from moecluster.cli.app import main; main()", "gateway")


@dataclass(frozen=True, kw_only=True)
class ServedCluster:
    """The running cluster."""

    cluster: RayCluster
    gateway_pid: int
    head: str  # its node's id

    def pids(self) -> dict[str, int]:
        """Returns the pid of every actor that answers, and of the gateway."""
        return {**self.cluster.pids(5.0), "gateway": self.gateway_pid}

    def status(self) -> ControllerStatus:
        """Returns the controller's status, once it answers."""
        return wait_for_result(self.cluster.status, "the controller answers")

    def nodes_of_experts(self) -> dict[str, int]:
        """Returns node -> number of experts on it, of actors that serve."""
        with self.calls() as calls:
            nodes = {actor.actor: actor.node for actor in calls.loads().actors}
        found: dict[str, int] = {}
        for actor in self.status().actors:
            if actor.phase is ActorPhase.SERVING and actor.experts and actor.actor in nodes:
                found[nodes[actor.actor]] = found.get(nodes[actor.actor], 0) + actor.experts
        return found

    def workers(self) -> set[str]:
        """Returns the living nodes but the head."""
        return living_nodes() - {self.head}

    def operations(self, kind: OperationKind) -> list[Operation]:
        """Returns the operations of a kind, newest first."""
        with self.calls() as calls:
            return [operation for operation in calls.operations() if operation.kind is kind]

    def calls(self) -> ControllerCalls:
        """Returns a connection to the controller, to be closed."""
        return ControllerCalls(f"127.0.0.1:{CONTROLLER_PORT}", credentials=CREDENTIALS)

    def is_large(self) -> bool:
        """Whether all actors that there may be serve, experts of some on another node than the head."""
        serving = [actor for actor in self.status().actors if actor.phase is ActorPhase.SERVING]
        return len(serving) == MOST and bool(self.nodes_of_experts().keys() - {self.head}) and not self.is_changing()

    def is_small(self) -> bool:
        """Whether only the head is left, with the fewest expert actors and one router, and nothing changes."""
        names = self.cluster.driver.actors()
        experts = [name for name in names if name.startswith("expert-")]
        status = self.status()
        return (
            (len(experts), len(status.actors), sum(map(is_router, names))) == (FEWEST, FEWEST, 1)
            and not self.workers()
            and all(actor.phase is ActorPhase.SERVING for actor in status.actors)
            and len(status.router_states) == 1
            and not self.is_changing()
        )

    def is_changing(self) -> bool:
        """Whether an operation has not ended."""
        return bool(self.status().operations)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Waits until a condition is true; what a busy controller does not answer is asked again."""

        def look() -> object:
            try:
                return condition()
            except MoeClusterError:
                return None

        try:
            wait_for_result(look, what, CHANGE_S)
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.status()}\nnodes: {living_nodes()}") from exc


@contextmanager
def served(model_dir: str, folder: Path, head: str) -> Iterator[ServedCluster]:
    """Context: the model is served at URL, as MODEL. folder: for the cluster's secret and the gateway's log."""
    secret = folder / "secret" / "cluster"
    write_secret(secret, CREDENTIALS)
    with RayCluster(model_dir, SETTINGS) as cluster, (folder / "gateway.log").open("w") as log:
        words = ("--model", f"{MODEL}=127.0.0.1:{CONTROLLER_PORT}", "--secret-file", str(secret))
        gateway = subprocess.Popen([*GATEWAY, *words, "--port", str(HTTP_PORT)], stdout=log, stderr=log)
        try:
            running = ServedCluster(cluster=cluster, gateway_pid=gateway.pid, head=head)
            wait_for_result(_serves, "the gateway serves", CHANGE_S)
            assert CONTROLLER in running.pids()
            yield running
        finally:
            gateway.terminate()
            gateway.wait()


def _serves() -> bool:
    try:
        return httpx.get(f"{URL}/health", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False
