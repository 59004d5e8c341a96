"""Starts /metrics of an actor's process. Apart, since the check of tokens takes a quarter of a second to import."""

from moecluster.config import Config
from moecluster.metrics import Metrics
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.metrics_server import MetricsServer


def serve_metrics(metrics: Metrics, config: Config, credentials: ClusterCredentials, port: int) -> MetricsServer:
    """Serves them until the process ends. port 0: any free one. Raises ResourceError if it is in use, ConfigError."""
    return MetricsServer(
        metrics,
        credentials=credentials,
        host=config.cluster.host,
        port=port,
        is_open=config.security.open_metrics,
    )
