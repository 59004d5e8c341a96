"""The shell of the controller: a Controller behind gRPC in a process that Ray keeps alive."""

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from actors.checkpoint_actor import announce, checkpoint_opener
from actors.controller_config import controller_settings, load_source
from actors.given_directories import GivenDirectories
from actors.metrics import serve_metrics
from actors.names import CONTROLLER, Endpoints, make_metrics
from actors.node_address import CONTROLLER_PORT, listen_address, own_endpoints, own_process
from actors.restart_policy import restart_on_init_failure
from actors.supervisor import RaySupervisor
from moecluster.config import read_config
from moecluster.controller.controller import Controller
from moecluster.errors import DeadlineExceeded, MoeClusterError
from moecluster.rpc.controller.server import serve_controller
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert.client import GrpcExpertControl
from moecluster.rpc.health import HealthWatch
from moecluster.rpc.reach import Peer, Unreached, unreached
from moecluster.rpc.scrape_targets import scrape_targets
from moecluster.types import ActorAddress, Replica

logger = logging.getLogger(__name__)

ORDER_TIMEOUT_S = 5.0  # for quick requests; loading has its own timeout


class ControllerActor:
    """Takes over whatever its expert actors hold, also after Ray has restarted it."""

    @restart_on_init_failure
    def __init__(
        self,
        tables: Mapping[str, Any],
        credentials: ClusterCredentials,
        model_dir: str,
        replicas: tuple[Replica, ...],
        layer_experts: Mapping[int, int],
        metrics_port: int,
    ) -> None:
        config = read_config(tables)
        self._tables = tables
        self._credentials = credentials
        metrics = make_metrics(config)
        listen = listen_address(config)
        metrics_server = serve_metrics(metrics, config, credentials, listen, metrics_port)
        self._process = own_process(metrics_server.address)
        self._start_timeout_s = config.cluster.start_timeout_s
        supervisor = RaySupervisor(config, credentials)
        self._controller = Controller(
            controller_settings(config, model_dir, replicas, layer_experts),
            supervisor=supervisor,
            routers=supervisor,
            connect=partial(_connect, credentials),
            watch=partial(_watch, credentials),
            metrics=metrics,
            is_given=GivenDirectories(config.cluster.name),
            source=load_source(config, layer_experts),
            on_deposed=_leave,
            announce=partial(_announce, config.cluster.name),
            open_elsewhere=checkpoint_opener(config.cluster.name, credentials),
            end=supervisor.end_cluster,
            process=self._process,
        )
        metrics_server.list_targets(lambda: scrape_targets(self._controller.status()))
        self._server = serve_controller(
            self._controller,
            credentials=credentials,
            listen=listen.at(config.cluster.controller_port, CONTROLLER_PORT),
        )
        self._failure: MoeClusterError | None = None
        self._started = threading.Event()
        threading.Thread(target=self._start, name="start", daemon=True).start()

    def endpoints(self) -> Endpoints:
        """Returns the addresses of the process."""
        return own_endpoints(CONTROLLER, self._server, self._process.metrics_address)

    def unreached(self, peers: Sequence[Peer], timeout_s: float) -> tuple[Unreached, ...]:
        """Returns the servers that this process does not reach."""
        return unreached(peers, credentials=self._credentials, timeout_s=timeout_s)

    def credentials(self) -> ClusterCredentials:
        """Returns the cluster's secret, for a command on a host without its file. Ray has authenticated the caller."""
        return self._credentials

    def settings(self) -> Mapping[str, Any]:
        """Returns the settings that the cluster was started with, as tables."""
        return self._tables

    def wait_started(self, timeout_s: float) -> None:
        """Returns once the first placement is published. Raises the error that kept the experts from being loaded."""
        if not self._started.wait(timeout_s):
            raise DeadlineExceeded(f"the experts were not loaded within {timeout_s:g} s")
        if self._failure is not None:
            raise self._failure

    def _start(self) -> None:
        try:
            self._controller.start(self._start_timeout_s)
        except MoeClusterError as exc:
            logger.error("the controller cannot start: %s", exc)
            self._failure = exc
        self._started.set()


def _connect(credentials: ClusterCredentials, address: ActorAddress) -> GrpcExpertControl:
    return GrpcExpertControl(address.actor, address.address, timeout_s=ORDER_TIMEOUT_S, credentials=credentials)


def _watch(credentials: ClusterCredentials, address: ActorAddress, on_lost: Callable[[], None]) -> HealthWatch:
    return HealthWatch(address.address, on_lost, credentials=credentials)


def _announce(namespace: str, directory: str) -> None:
    try:
        announce(namespace, directory)
    except MoeClusterError as exc:  # then every node must see the directory itself
        logger.info("%s is not announced: %s", directory, exc)


def _leave() -> None:
    """Exits: another controller has taken over. Ray restarts this one, which takes a higher term if it is alone."""
    os._exit(1)
