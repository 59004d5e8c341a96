"""A real Prometheus with the configuration and the rules that are shipped follows a cluster by itself."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecluster.controller.load.prometheus_client import PrometheusServer
from moecluster.controller.rebalance.apply import ApplierSettings
from moecluster.controller.rebalance.observe import ObserverSettings
from moecluster.controller.reconciler import ReconcilerSettings
from moecluster.rpc.credentials import ClusterCredentials
from tests.support.clusters.prometheus_server import SCRAPED, check_config, prometheus_of
from tests.support.clusters.scraped_cluster import CLUSTER, ScrapedCluster
from tests.support.waiting import wait_until

CLUSTERS = Path(__file__).parents[3] / "clusters"
TOKEN, TARGETS = "/etc/prometheus/moecluster.token", "http://127.0.0.1:9101/sd"
EVERY = "1s"


def shipped(folder: Path, sd_address: str, *, tls: bool) -> dict[str, Any]:
    """clusters/prometheus.yml and its rules with this cluster's address and token, and as its comment says with TLS.
    Only the waiting is shortened: the intervals, and for how long an alert must hold before it fires."""
    text = (CLUSTERS / "prometheus.yml").read_text()
    assert TOKEN in text and TARGETS in text
    url = f"{'https' if tls else 'http'}://{sd_address}/sd"
    config: dict[str, Any] = yaml.safe_load(text.replace(TOKEN, str(folder / "token")).replace(TARGETS, url))
    config["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), EVERY)
    (job,) = config["scrape_configs"]
    job["http_sd_configs"][0]["refresh_interval"] = EVERY
    if tls:
        for part in (job, job["http_sd_configs"][0]):
            part["tls_config"] = {"ca_file": str(folder / "tls" / "ca.crt"), "server_name": "moecluster"}
    rules = yaml.safe_load((CLUSTERS / "prometheus-rules.yml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"] if "for" in rule):
        rule["for"] = EVERY
    (folder / "prometheus-rules.yml").write_text(yaml.safe_dump(rules))
    return config


@pytest.fixture
def cluster(checkpoint: str, prometheus_folder: Path, request: pytest.FixtureRequest) -> Iterator[ScrapedCluster]:
    """Four actors. A lost one is not started again by itself before the test has seen that it is lost."""
    tls_dir = str(prometheus_folder / "tls") if request.param else ""
    with ScrapedCluster(
        checkpoint,
        credentials=ClusterCredentials(secret=SCRAPED.secret, tls_dir=tls_dir),
        num_actors=4,
        start_timeout_s=600.0,
        observer=ObserverSettings(slots_per_layer=4),
        reconciler=ReconcilerSettings(policy="share", period_s=0.05, operation_timeout_s=30.0),
        applier=ApplierSettings(drain_timeout_s=2.0),
    ) as cluster:
        yield cluster


class Watched:
    """What a Prometheus knows of a cluster."""

    def __init__(self, address: str) -> None:
        self.server = PrometheusServer(address, timeout_s=5.0)

    def scraped(self, role: str) -> set[str]:
        """Names of the processes of a role whose last scrape succeeded."""
        return {sample.labels["process"] for sample in self.server.query(f'up{{role="{role}"}} == 1')}

    def has(self, actors: int) -> bool:
        """Whether so many expert actors are scraped, and no other is expected any more."""
        return len(self.scraped("expert")) == len(self.server.query('up{role="expert"}')) == actors

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {sample.labels["alertname"] for sample in self.server.query('ALERTS{alertstate="firing"}')}


@pytest.fixture
def watched(cluster: ScrapedCluster, prometheus_folder: Path) -> Iterator[Watched]:
    config = shipped(prometheus_folder, cluster.sd_address, tls=bool(cluster.credentials.tls_dir))
    with prometheus_of(prometheus_folder, config) as running:
        check_config(prometheus_folder / "prometheus.yml")
        yield Watched(running.address)


@pytest.mark.parametrize("cluster", [False], ids=["http"], indirect=True)
def test_it_follows_a_cluster_that_grows_shrinks_and_loses_an_actor(cluster: ScrapedCluster, watched: Watched) -> None:
    wait_until(lambda: watched.scraped("expert") == {f"expert-{i}" for i in range(4)}, "four actors")
    for role in ("router", "controller"):
        wait_until(partial(_is_scraped, watched, role), role)
    for size in (6, 3):
        cluster.controller.scale(size)
        wait_until(partial(watched.has, size), f"{size} actors")
    shown = watched.server.query("moecluster_build_info")
    assert {(s.labels["model"], s.labels["cluster"]) for s in shown} == {("tiny", CLUSTER)}
    assert len({s.labels["process"] for s in shown}) == 5

    wait_until(lambda: not watched.firing(), "that nothing is wrong")
    lost = min(watched.scraped("expert"))
    cluster.kill(lost)
    wait_until(lambda: watched.firing() >= {"MoeClusterActorLost", "MoeClusterDegraded"}, "the alerts")
    cluster.revive(lost)
    wait_until(lambda: lost in watched.scraped("expert") and not watched.firing(), "that the actor is back")


@pytest.mark.parametrize("cluster", [True], ids=["https"], indirect=True)
def test_it_follows_a_cluster_with_certificates(cluster: ScrapedCluster, watched: Watched) -> None:
    wait_until(lambda: watched.has(4) and _is_scraped(watched, "controller"), "all processes")
    assert cluster.credentials.tls_dir


def _is_scraped(watched: Watched, role: str) -> bool:
    return watched.scraped(role) == {role}
