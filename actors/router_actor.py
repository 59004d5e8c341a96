"""The shell of a router: a Router behind gRPC. A training rank runs in the process of the first one."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch

from actors.checkpoint_source import checkpoint_opener
from actors.ray_calls import controller_resolver
from actors.settings import Endpoints
from actors.training_host import Progress, TrainingHost
from moecluster.config import Config, read_config
from moecluster.errors import MoeClusterError, Unavailable
from moecluster.metrics import Metrics
from moecluster.roles.expert_pool import ExpertPool
from moecluster.roles.load_reporter import LoadReporter
from moecluster.roles.remote_experts import RemoteExperts
from moecluster.roles.router import Router
from moecluster.rpc.controller_calls import controller_status, set_checkpoint
from moecluster.rpc.controller_client import ControllerClient
from moecluster.rpc.expert_control import GrpcExpertControl
from moecluster.rpc.expert_stream import GrpcExpertTransport
from moecluster.rpc.interfaces import ExpertTransport
from moecluster.rpc.router_server import serve_router
from moecluster.types import ActorAddress

POLL_S = 0.2


class RouterActor:
    """Loads the trunk, and reaches the experts by the controller's placement."""

    def __init__(self, tables: Mapping[str, Any], name: str, model_dir: str, metrics_port: int) -> None:
        """model_dir: trunk and tokenizer at first; a router that is started again takes what the controller names."""
        config = read_config(tables)
        self._config = config
        self._name = name
        self._metrics = Metrics(model=config.cluster.name, max_expert_series=config.cluster.max_expert_series)
        port = self._metrics.serve(host=config.cluster.host, port=metrics_port)
        self._metrics_address = f"{config.cluster.host}:{port}"
        resolve = controller_resolver(config.cluster.name)
        self._placements = ControllerClient(router=name, resolve=resolve)
        self._experts = make_remote_experts(config, self._placements, self._metrics)
        self._reporter = LoadReporter(self._experts.loads, self._placements.report_load)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            model_dir = served_checkpoint(resolve, config.cluster.start_timeout_s)
        self._router = Router(
            model_dir,
            self._experts,
            name=name,
            dtype=getattr(torch, config.model.dtype),
            device="cuda" if config.cluster.gpus_per_router and torch.cuda.is_available() else "cpu",
            metrics=self._metrics,
            open_elsewhere=checkpoint_opener(config.cluster.name),
        )
        self._training = TrainingHost(
            self._experts,
            self._placements,
            announce=lambda checkpoint: set_checkpoint(resolve(), checkpoint),
            metrics=self._metrics,
        )
        self._server = serve_router(self._router, host=config.cluster.host)

    def endpoints(self) -> Endpoints:
        """Where the process is reached."""
        return Endpoints(
            actor=self._name, pid=os.getpid(), address=self._server.address, metrics_address=self._metrics_address
        )

    def reload(self, model_dir: str) -> None:
        """Takes trunk and tokenizer of another directory. Raises CheckpointError or UnsupportedModelError."""
        self._router.reload(model_dir)

    def train(self, tables: Mapping[str, Any], start: str) -> None:
        """Begins a training run from a directory. Raises UserError if one is under way."""
        self._training.start(read_config(tables), Path(start))

    def training_progress(self, since: int) -> Progress:
        """What the run has told since event number `since`."""
        return self._training.progress(since)

    def stop_training(self) -> None:
        """Ends the run after what it does now."""
        self._training.stop()


def served_checkpoint(resolve: Callable[[], str], timeout_s: float) -> str:
    """The directory that the experts are loaded from now: training may have gone on since the cluster was started.

    Waits for the controller, which may be started again, too. Raises Unavailable after the timeout.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return controller_status(resolve()).checkpoint
        except MoeClusterError as exc:
            if time.monotonic() > deadline_s:
                raise Unavailable(f"no controller says within {timeout_s:g} s what is served: {exc}") from exc
            time.sleep(POLL_S)


def make_remote_experts(config: Config, placements: ControllerClient, metrics: Metrics) -> RemoteExperts:
    """The experts of a cluster, as a trunk's backend."""
    shared_memory_bytes = config.router.shared_memory_bytes if config.router.transport == "auto" else 0

    def connect(address: ActorAddress) -> ExpertTransport:
        return GrpcExpertTransport(address, router=placements.router, shared_memory_bytes=shared_memory_bytes)

    def control(address: ActorAddress) -> GrpcExpertControl:
        return GrpcExpertControl(address.actor, address.address, timeout_s=config.router.request_timeout_s)

    return RemoteExperts(
        ExpertPool(placements, connect=connect, control=control),
        timeout_s=config.router.request_timeout_s,
        batch_invariant=config.experts.batch_invariant,
        metrics=metrics,
    )
