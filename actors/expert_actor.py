"""The shell of an expert actor: an ExpertService behind gRPC in a process that Ray keeps alive."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray

from actors.checkpoint_actor import checkpoint_opener
from actors.given_directories import GivenDirectories
from actors.names import Endpoints, make_metrics
from actors.node_address import METRICS_PORT, listen_address, own_endpoints, own_process
from actors.restart_policy import restart_on_init_failure
from moecluster.config import read_config
from moecluster.expert.service import ExpertService
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert.export import GrpcPeerExports
from moecluster.rpc.expert.server import serve_expert
from moecluster.rpc.reach import Peer, Unreached, unreached
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
        self._credentials = credentials
        self._metrics = make_metrics(config)
        listen = listen_address(config)
        self._process = own_process(self._metrics.serve(listen.at(metrics_port, METRICS_PORT)))
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
        self._server = serve_expert(self._service, credentials=credentials, listen=listen)

    def address(self) -> ActorAddress:
        """Returns where this incarnation of the actor listens."""
        return ActorAddress(
            actor=self._name,
            address=self._server.address,
            incarnation=self._service.incarnation,
            node=ray.get_runtime_context().get_node_id(),
            process=self._process,
        )

    def endpoints(self) -> Endpoints:
        """Returns the addresses of the process."""
        return own_endpoints(self._name, self._server, self._process.metrics_address)

    def unreached(self, peers: Sequence[Peer], timeout_s: float) -> tuple[Unreached, ...]:
        """Returns the servers that this process does not reach."""
        return unreached(peers, credentials=self._credentials, timeout_s=timeout_s)
