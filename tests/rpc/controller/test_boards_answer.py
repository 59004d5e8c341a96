"""Every panel of the Grafana boards gets data from a real Prometheus that scrapes a cluster at work.

What only shows when something goes wrong is asked of a page that has a value of every metric.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moecluster.client import Client
from moecluster.controller.load.prometheus_client import PrometheusServer
from moecluster.controller.rebalance.apply import ApplierSettings
from moecluster.controller.rebalance.observe import ObserverSettings
from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.dispatch.load_counts import LoadReporter
from moecluster.gateway.metrics import GatewayMetrics
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import ModelSource
from moecluster.metrics import Metrics
from moecluster.rpc.metrics_server import MetricsServer
from moecluster.training.loop import TrainingLoop
from moecluster.training.setup import prepare_start, read_data, run_tokenizer
from tests.support.board_queries import PanelQuery, panel_queries
from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.clusters.prometheus_server import SCRAPE_INTERVAL_S, SCRAPED, RunningPrometheus
from tests.support.clusters.running_gateway import running_gateway
from tests.support.clusters.scraped_cluster import CLUSTER, ScrapedCluster
from tests.support.every_metric import set_all, set_all_of_a_gateway
from tests.support.training.training_runs import make_config, write_text

MODEL = "tiny"
# A cluster in which nothing fails, and nothing is under way, has none of these.
OF_TROUBLE = {
    "moecluster_operation_age_seconds",
    "moecluster_operation_gain",
    "moecluster_dispatch_retries_total",
    "moecluster_nonfinite_replies_total",
    "moecluster_dropped_assignments_total",
    "moecluster_gateway_failovers_total",
    "moecluster_train_step_replays_total",
}
MAX_ROUNDS = 60  # of requests and scrapes; counters need two scrapes
TROUBLED = ("model", "cluster")  # model and cluster of the pages with every metric


@pytest.fixture
def cluster(checkpoint: str) -> Iterator[ScrapedCluster]:
    with ScrapedCluster(
        checkpoint,
        credentials=SCRAPED,
        num_actors=3,
        observer=ObserverSettings(window="sliding", window_s=2.0, slots_per_layer=4),
        reconciler=ReconcilerSettings(policy="share", period_s=0.05, operation_timeout_s=30.0),
        applier=ApplierSettings(drain_timeout_s=2.0),
    ) as cluster:
        yield cluster


def train(folder: Path, metrics: Metrics) -> None:
    """A short run, whose process shows these metrics."""
    config = make_config(write_text(folder), folder / "run")
    start, tokenizer = prepare_start(config), run_tokenizer(config)
    with ExpertCluster(start) as experts:
        data = read_data(config, tokenizer)
        loop = TrainingLoop(config, experts.remote, start=start, data=data, tokenizer=tokenizer, metrics=metrics)
        list(loop.run())
        loop.close()


def test_every_panel_has_data(cluster: ScrapedCluster, prometheus: RunningPrometheus, tmp_path: Path) -> None:
    of_training, of_trouble = Metrics(model=MODEL, cluster=CLUSTER), Metrics(model=TROUBLED[0], cluster=TROUBLED[1])
    of_troubled_gateway = GatewayMetrics()
    set_all(of_trouble, layers=2, experts=4)
    set_all_of_a_gateway(of_troubled_gateway)
    of_trouble.registry.register(of_troubled_gateway.registry)
    pages = [MetricsServer(metrics, credentials=SCRAPED) for metrics in (of_training, of_trouble)]
    reporter = LoadReporter(cluster.remote.loads, cluster.placements.report_load, window_s=0.1)
    source = ModelSource(
        name=MODEL, cluster=CLUSTER, alias=CLUSTER, seeds=ClusterAddresses(routers=(cluster.router_server.address,))
    )
    with running_gateway(source) as gateway, Client(cluster.router_server.address) as client:
        own = [page.address for page in (*cluster.pages.values(), *pages)]
        prometheus.scrape(*own, gateway.url.removeprefix("http://"))
        train(tmp_path, of_training)
        server = PrometheusServer(prometheus.address, timeout_s=5.0)
        cluster.controller.scale(2)

        waiting = panel_queries()
        openai = gateway.openai()
        for _ in range(MAX_ROUNDS):
            openai.completions.create(model=MODEL, prompt="abc", max_tokens=4)
            list(client.generate("abc", max_new_tokens=2))
            of_training.observe_train_step(loss=2.0, aux_losses={"load_balance": 0.1}, seconds=0.1)
            waiting = [query for query in waiting if not server.query(filled(query))]
            if not waiting:
                break
            time.sleep(SCRAPE_INTERVAL_S)
        assert not waiting, "\n" + "\n".join(f"{query.board}, {query.panel}: {filled(query)}" for query in waiting)
    reporter.close()
    for page in pages:
        page.close()


def filled(query: PanelQuery) -> str:
    model, cluster = TROUBLED if query.metrics & OF_TROUBLE else (MODEL, CLUSTER)
    return query.filled({"model": model, "cluster": cluster, "layer": "0", "__rate_interval": "5s"})
