"""Starts /metrics of an actor's process. Apart, since the check of tokens takes a quarter of a second to import."""

from prometheus_client import disable_created_metrics

from actors.node_address import METRICS_PORT
from moecluster.addresses import ListenAddress
from moecluster.config import Config
from moecluster.metrics import Metrics
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.metrics_server import MetricsServer


def serve_metrics(
    metrics: Metrics, config: Config, credentials: ClusterCredentials, listen: ListenAddress, port: int
) -> MetricsServer:
    """Serves them until the process ends. listen: of this process. port 0: any free one. Raises ResourceError if it is
    in use, ConfigError."""
    disable_created_metrics()  # a series beside each counter that says when it began: start_time_seconds does
    return MetricsServer(
        metrics,
        credentials=credentials,
        listen=listen.at(port, METRICS_PORT),
        is_open=config.security.open_metrics,
    )
