"""The shell of an expert actor: an ExpertService behind gRPC in a process that Ray keeps alive."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray

from actors.checkpoint_actor import checkpoint_opener
from actors.given_directories import GivenDirectories
from actors.metrics import serve_metrics
from actors.names import Endpoints, make_metrics
from actors.restart_policy import restart_on_init_failure
from moecluster.config import read_config
from moecluster.expert.service import ExpertService
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert.export import GrpcPeerExports
from moecluster.rpc.expert.server import serve_expert
from moecluster.rpc.tensors import expect_read_only_views
from moecluster.types import ActorAddress


class ExpertActor:
    """Holds no experts at first; the controller tells it what to load."""

    @restart_on_init_failure
    def __init__(
        self, tables: Mapping[str, Any], credentials: ClusterCredentials, name: str, metrics_port: int
    ) -> None:
        """credentials: required by its server, and sent to other actors."""
        expect_read_only_views()
        config = read_config(tables)
        self._name = name
        self._metrics = make_metrics(config)
        port = serve_metrics(self._metrics, config, credentials, metrics_port).port
        self._metrics_address = f"{config.cluster.host}:{port}"
        self._service = ExpertService(
            name=name,
            is_given=GivenDirectories(config.cluster.name),
            max_queue_bytes=config.experts.max_queue_bytes,
            activation_budget_bytes=config.experts.activation_budget_bytes,
            batch_invariant=config.experts.batch_invariant,
            metrics=self._metrics,
            open_elsewhere=checkpoint_opener(config.cluster.name, credentials),
            connect_peer=partial(GrpcPeerExports, credentials=credentials),
        )
        self._server = serve_expert(self._service, credentials=credentials, host=config.cluster.host)

    def address(self) -> ActorAddress:
        """Returns where this incarnation of the actor listens."""
        return ActorAddress(
            actor=self._name,
            address=self._server.address,
            incarnation=self._service.incarnation,
            node=ray.get_runtime_context().get_node_id(),
        )

    def endpoints(self) -> Endpoints:
        """Returns the addresses of the process."""
        return Endpoints(
            actor=self._name, pid=os.getpid(), address=self._server.address, metrics_address=self._metrics_address
        )
