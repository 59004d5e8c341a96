"""The shell of a router: a Router behind gRPC. Training runs in the process of the first one.

Modules that import transformers, which takes seconds and 100 MB, are imported in a router's own process only: the
controller, which starts routers, does without.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch

from actors.checkpoint_actor import announce_here, checkpoint_opener
from actors.given_directories import GivenDirectories
from actors.names import Endpoints, make_metrics
from actors.node_address import METRICS_PORT, listen_address, own_endpoints, own_process
from actors.ray_calls import controller_resolver
from actors.restart_policy import restart_on_init_failure
from moecluster.config import Config, read_config
from moecluster.dispatch.connection_pool import ExpertPool
from moecluster.dispatch.load_counts import LoadReporter
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.metrics import Metrics
from moecluster.rpc.controller.client import set_checkpoint
from moecluster.rpc.controller.subscription import ControllerClient
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.rpc.expert.compute_stream import GrpcExpertTransport
from moecluster.rpc.expert.interface import ExpertTransport
from moecluster.rpc.reach import Peer, Unreached, unreached
from moecluster.rpc.router.server import serve_router
from moecluster.rpc.tensors import expect_read_only_views
from moecluster.types import ActorAddress, RouterState

MORE_CALLS = 64


class RouterActor:
    """Loads the trunk, and reaches the experts through the controller's placement."""

    @restart_on_init_failure
    def __init__(
        self,
        tables: Mapping[str, Any],
        credentials: ClusterCredentials,
        name: str,
        model_dir: str,
        metrics_port: int,
    ) -> None:
        """credentials: required by its server, and sent to other actors. model_dir: initial trunk and tokenizer; a
        restarted router loads what the controller names."""
        from actors.training_host import TrainingHost
        from moecluster.hf.continuous_batching import silence_batch_log
        from moecluster.router.engine.engine import EngineLimits
        from moecluster.router.router import Router

        expect_read_only_views()
        silence_batch_log()
        config = read_config(tables)
        self._config = config
        self._name = name
        self._credentials = credentials
        self._metrics = make_metrics(config)
        listen = listen_address(config)
        self._process = own_process(self._metrics.serve(listen.at(metrics_port, METRICS_PORT)))
        resolve = controller_resolver(config.cluster.name)
        self._serving: tuple[Router, str] | None = None  # and its gRPC address
        self._placements = ControllerClient(router=name, resolve=resolve, state=self._state, credentials=credentials)
        self._experts = make_remote_experts(config, self._placements, self._metrics, credentials)
        self._reporter = LoadReporter(self._experts.loads, self._placements.report_load)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            model_dir = self._placements.current(config.cluster.start_timeout_s).checkpoint or model_dir
        is_given = GivenDirectories(config.cluster.name)
        self._router = Router(
            model_dir,
            self._experts,
            limits=EngineLimits.of(config.serve),
            is_given=is_given,
            name=name,
            dtype=getattr(torch, config.model.dtype),
            device="cuda" if config.cluster.gpus_per_router and torch.cuda.is_available() else "cpu",
            metrics=self._metrics,
            on_change=self._placements.renew,
            controller=lambda: self._placements.controller,
            open_elsewhere=checkpoint_opener(config.cluster.name, credentials),
        )

        def announce_checkpoint(checkpoint: str) -> None:
            announce_here(config, credentials, checkpoint)
            set_checkpoint(resolve(), checkpoint, credentials=credentials)

        self._training = TrainingHost(
            self._experts,
            self._placements,
            announce=announce_checkpoint,
            is_given=is_given,
            served=lambda: self._placements.current(config.cluster.start_timeout_s).checkpoint,
            metrics=self._metrics,
        )
        # A call for every running or waiting request, and some for those that are refused or only ask for status.
        max_calls = config.serve.max_running + config.serve.max_waiting + MORE_CALLS
        self._server = serve_router(
            self._router, self._training, credentials=credentials, listen=listen, max_calls=max_calls
        )
        self._serving = (self._router, self._server.address)

    def endpoints(self) -> Endpoints:
        """Returns the addresses of the process."""
        return own_endpoints(self._name, self._server, self._process.metrics_address)

    def unreached(self, peers: Sequence[Peer], timeout_s: float) -> tuple[Unreached, ...]:
        """Returns the servers that this process does not reach."""
        return unreached(peers, credentials=self._credentials, timeout_s=timeout_s)

    def _state(self) -> RouterState:
        """Returns what is reported at every renewal of the lease; only the name until the router serves."""
        if self._serving is None:
            return RouterState(router=self._name)
        router, address = self._serving
        return replace(router.state(), address=address, process=self._process)


def make_remote_experts(
    config: Config, placements: ControllerClient, metrics: Metrics, credentials: ClusterCredentials
) -> RemoteExperts:
    """Returns the backend that connects a trunk to the cluster's experts."""
    shared_memory_bytes = config.router.shared_memory_bytes if config.router.transport == "auto" else 0

    def connect(address: ActorAddress) -> ExpertTransport:
        return GrpcExpertTransport(
            address, router=placements.router, shared_memory_bytes=shared_memory_bytes, credentials=credentials
        )

    def control(address: ActorAddress) -> GrpcExpertControl:
        return GrpcExpertControl(
            address.actor, address.address, timeout_s=config.router.request_timeout_s, credentials=credentials
        )

    return RemoteExperts(
        ExpertPool(placements, connect=connect, control=control),
        timeout_s=config.router.request_timeout_s,
        batch_invariant=config.experts.batch_invariant,
        metrics=metrics,
    )
