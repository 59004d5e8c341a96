"""A loopback cluster whose processes show their metrics and list each other, as those of a real cluster do."""

from typing import Any

from moecluster.controller.controller import Controller
from moecluster.metrics import Metrics
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.metrics_server import MetricsServer
from moecluster.rpc.scrape_targets import scrape_targets
from moecluster.rpc.server import RunningServer
from moecluster.types import ProcessInfo
from tests.support.clusters.loopback_cluster import LoopbackCluster

CLUSTER = "watched"


class ScrapedCluster(LoopbackCluster):
    """Every process has a metrics server of its own."""

    def __init__(self, directory: str, *, credentials: ClusterCredentials, **options: Any) -> None:
        """credentials: of the metrics servers; with a tls_dir, they speak TLS."""
        self.credentials = credentials
        self.pages: dict[str, MetricsServer] = {}
        super().__init__(directory, **options)

    @property
    def sd_address(self) -> str:
        """host:port of the controller's list of targets."""
        return self.pages["controller"].address

    def new_metrics(self) -> Metrics:
        """Returns the metrics of a process."""
        return Metrics(model="tiny", cluster=CLUSTER)

    def show(self, process: str, metrics: Metrics) -> ProcessInfo:
        """Shows the metrics of a process that starts."""
        self.pages[process] = MetricsServer(metrics, credentials=self.credentials)
        return ProcessInfo(metrics_address=self.pages[process].address)

    def start_controller(self) -> tuple[Controller, RunningServer]:
        """Starts it, with its list."""
        controller, server = super().start_controller()
        self.pages["controller"].list_targets(lambda: scrape_targets(controller.status()))
        return controller, server

    def kill(self, actor: str) -> None:
        """Kills an actor, and its page with it."""
        super().kill(actor)
        self.pages.pop(actor).close()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for page in self.pages.values():
            page.close()
