import re
import urllib.request
from pathlib import Path

import pytest

from moecluster.addresses import ListenAddress, split_host_port
from moecluster.client import Client
from moecluster.errors import ResourceError
from moecluster.metrics import Metrics
from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.waiting import wait_until


def requests_of(address: str) -> dict[str, float]:
    """(running, waiting) from a router's /metrics."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        shown = answer.read().decode()
    found = re.findall(r'^moecluster_router_(\w+)_requests\{cluster="",model="tiny"\} (\S+)$', shown, re.MULTILINE)
    return {state: float(count) for state, count in found}


def test_metrics_are_served_on_a_free_port_and_gone_after_close() -> None:
    metrics = Metrics(model="m")
    metrics.set_generation(7)
    address = metrics.serve(ListenAddress())
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        assert 'moecluster_placement_generation{cluster="",model="m"} 7.0' in answer.read().decode()
    metrics.close()
    metrics.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://{address}/metrics", timeout=5)


def test_a_port_in_use_is_a_users_error_that_names_it() -> None:
    first, second = Metrics(model="m"), Metrics(model="m")
    address = first.serve(ListenAddress())
    try:
        with pytest.raises(ResourceError, match=rf"{address}.*in use.*cluster\.metrics_port"):
            second.serve(ListenAddress(port=split_host_port(address)[1]))
    finally:
        first.close()


def test_a_router_shows_how_many_requests_run_and_wait(tmp_path: Path) -> None:
    with LoopbackCluster(save_tiny_model(tmp_path), max_running=2, max_waiting=4) as cluster:
        address = cluster.metrics.serve(ListenAddress())
        try:
            assert requests_of(address) == {"running": 0, "waiting": 0}
            for actor in cluster.names:
                cluster.kill(actor)  # so that no request finishes
            with Client(cluster.router_server.address) as client:
                texts = [client.generate("def add(a, b):", max_new_tokens=200) for _ in range(5)]
                wait_until(lambda: requests_of(address) == {"running": 2, "waiting": 3})
                for text in texts:
                    text.cancel()
                wait_until(lambda: requests_of(address) == {"running": 0, "waiting": 0})
            for actor in cluster.names:
                cluster.revive(actor)
        finally:
            cluster.metrics.close()
