"""A Ray Serve application, for a RayService: a cluster, and its HTTP gateway behind Serve's proxies.

    import_path: actors.serve_app:build
    args: {target: /etc/moecluster/moecluster.toml}

Two deployments: `cluster` starts the cluster's actors, once, and has them started again if they are lost; `gateway` is
the ASGI app of `moecluster gateway`, in as many replicas as Serve is told. Streams, API keys and limits are its own.
What guards connections is Serve's proxy, not ours: it has no deadlines for slow clients.
"""

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from prometheus_client import disable_created_metrics
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from actors.driver import CALL_TIMEOUT_S, Cluster
from actors.names import CONTROLLER
from actors.ray_calls import call, find_actor
from moecluster.config import Config, load_config, read_config
from moecluster.errors import CheckpointError, ConfigError, ResourceError, Unavailable
from moecluster.gateway.app import Gateway, build_app
from moecluster.gateway.metrics import GatewayMetrics
from moecluster.gateway.middleware import GatewayMiddleware
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import ModelSource, keys_of, open_models
from moecluster.rpc.credentials import secret_to_start_with
from moecluster.training.latest_weights import is_untrained, latest_weights

RETRY_PAUSE_S = 5.0  # until the cluster is tried again while nodes are missing
HEALTH_PERIOD_S = 2.0  # between looks whether the cluster is still there
OTHER_REQUESTS = 64  # beside generations: /health, /metrics, /v1/models

logger = logging.getLogger(__name__)


class Arguments(BaseModel):
    """The application's arguments, as they stand in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    target: str  # a TOML file that all nodes see, or a preset
    settings: dict[str, Any] = {}  # overrides, such as serve.max_inflight: 64
    random_weights: bool = False  # serve a fresh model if nothing is trained


def build(arguments: Arguments) -> Application:
    """Returns the application. Raises ConfigError."""
    config = load_config(arguments.target, arguments.settings)
    tables = config.to_tables()
    cluster = serve.deployment(
        name="cluster", num_replicas=1, ray_actor_options={"num_cpus": 0}, health_check_period_s=HEALTH_PERIOD_S
    )(ServedCluster)
    # The gateway itself refuses (429) what is too much; Serve must let through what it would refuse.
    most_requests = config.serve.max_inflight + config.serve.max_awaited_bodies + OTHER_REQUESTS
    gateway = serve.deployment(
        name="gateway",
        ray_actor_options={"num_cpus": 0.5},
        max_ongoing_requests=most_requests,
        max_queued_requests=most_requests,
        graceful_shutdown_timeout_s=config.serve.grace_s,
    )(serve.ingress()(HttpGateway))
    return gateway.bind(tables, cluster.bind(tables, arguments.target, arguments.random_weights))


class ServedCluster:
    """Starts the cluster, or takes over the one that an earlier replica started. The cluster outlives the replica."""

    def __init__(self, tables: Mapping[str, Any], target: str, random_weights: bool) -> None:
        """Returns when the cluster serves. Raises UserError; Serve tries again."""
        config = read_config(tables)
        self._cluster = Cluster(config.cluster.name)
        actors = self._cluster.actors()
        if CONTROLLER in actors:  # it is started last
            _refuse_other_settings(self._cluster, config)
            return
        if actors:  # a start was broken off
            self._cluster.stop()
        model_dir = _model_to_serve(config, target, random_weights)
        _start(self._cluster, config, model_dir)

    def check_health(self) -> None:
        """Raises Unavailable if nothing of the cluster comes back by itself: Serve then replaces this replica."""
        if CONTROLLER not in self._cluster.actors():
            raise Unavailable(f"the cluster {self._cluster.name} is gone")


class HttpGateway:
    """The gateway's app; it finds the cluster through Ray, which also tells it the cluster's secret."""

    def __init__(self, tables: Mapping[str, Any], cluster: DeploymentHandle[Any]) -> None:
        """cluster: only so that Serve deploys both. Raises ConfigError for API keys that cannot be used."""
        config = read_config(tables)
        disable_created_metrics()
        # Serve's proxies, not this process, are what clients reach; TLS ends in front of them.
        self._gateway = Gateway(config.serve, config.security, keys_of(config.security), GatewayMetrics())
        name = config.cluster.name
        self._source = ModelSource(
            name=config.serve.model_name or name,
            cluster=name,
            alias=name,
            seeds=ClusterAddresses(),
            rediscover=partial(find_cluster, name),
        )

    def __serve_build_asgi_app__(self) -> GatewayMiddleware:
        return build_app(self._gateway, partial(open_models, self._gateway, [self._source]))


def find_cluster(name: str) -> ClusterAddresses:
    """Returns where a cluster's actors are, and its credentials. Raises Unavailable, DeadlineExceeded."""
    cluster = Cluster(name)
    return ClusterAddresses(
        routers=cluster.router_addresses(),
        controller=cluster.controller_address(),
        credentials=cluster.credentials(),
    )


def _start(cluster: Cluster, config: Config, model_dir: str) -> None:
    """Starts the cluster; nodes may still be missing, and are waited for within cluster.start_timeout_s."""
    deadline_s = time.monotonic() + config.cluster.start_timeout_s
    credentials = secret_to_start_with(cluster=cluster.name)  # the driver adds the certificates
    while True:
        try:
            cluster.start(config, model_dir, credentials=credentials)
            return
        except ResourceError as exc:
            if time.monotonic() + RETRY_PAUSE_S > deadline_s:
                raise
            logger.warning("the cluster %s cannot be started yet: %s", cluster.name, exc)
        time.sleep(RETRY_PAUSE_S)


def _model_to_serve(config: Config, target: str, random_weights: bool) -> str:
    """Returns the directory to serve. Raises UserError, as `moecluster up` does."""
    latest = latest_weights(config)
    trained = latest is not None and not is_untrained(config)
    if trained and random_weights:
        raise ConfigError(f"random_weights: {latest} has weights; leave it out, or set train.output_dir")
    if trained:
        assert latest is not None
        return latest
    if not random_weights:
        raise CheckpointError(
            f"{target} has no weights: set model.path, or train.output_dir to that of a run, or random_weights: true"
        )
    from moecluster.training.setup import prepare_start  # imports transformers, which takes seconds

    return str(prepare_start(config).resolve())


def _refuse_other_settings(cluster: Cluster, config: Config) -> None:
    """Raises ResourceError if the running cluster was started with settings other than these."""
    controller = find_actor(CONTROLLER, cluster.name)
    settings = read_config(call(controller.settings.remote(), CALL_TIMEOUT_S, CONTROLLER))
    if settings != config:
        ours, theirs = config.to_tables(), settings.to_tables()
        changed = [f"{section}.{key}" for section in ours for key in ours[section]
                   if ours[section][key] != theirs[section][key]]  # fmt: skip
        raise ResourceError(
            f"the cluster {cluster.name} is up with other settings ({', '.join(changed)}), which do not change while "
            "it runs: start a new Ray cluster for them (a RayService does when its pods' templates change), or take "
            "this one down first"
        )
