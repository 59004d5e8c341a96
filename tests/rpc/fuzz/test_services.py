"""Whatever requests arrive, every method of every service answers or ends with a clear status, in bounded time and
memory, and a good request after them is served as before.

Inputs are the same in every run. `make soak` searches further, guided by coverage (tests/soak/test_fuzzing.py).
"""

import logging
from collections.abc import Iterator, Mapping

import pytest

from moecluster.client import Client
from tests.support.clusters.every_method import OURS, methods_of
from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.clusters.loopback_cluster import LoopbackCluster
from tests.support.fuzz.run import Target, run_many
from tests.support.fuzz.services import MAX_ACTORS, service_targets

SERVICES = ("RouterService", "CheckpointService", "ExpertService", "ControllerService")
COUNT = 300
# These wait, or compute: a few of them show as much.
COUNTS = {"RouterService/Generate": 100, "RouterService/Moe": 100, "ControllerService/WatchPlacement": 60}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cluster(checkpoint: str) -> Iterator[LoopbackCluster]:
    with LoopbackCluster(checkpoint, max_actors=MAX_ACTORS) as running:
        yield running


@pytest.fixture
def targets(
    cluster: LoopbackCluster, checkpoint: str, caplog: pytest.LogCaptureFixture
) -> Iterator[Mapping[str, Target]]:
    caplog.set_level(logging.CRITICAL, logger="moecluster")  # refusals by the thousand
    with service_targets(cluster, checkpoint) as found:
        yield found


def test_there_is_a_target_for_every_method(targets: Mapping[str, Target]) -> None:
    assert {f"/moecluster.v1.{name}" for name in targets} == {method.path for method in methods_of(*OURS)}
    assert {name.partition("/")[0] for name in targets} == set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_every_method_of_a_service(service: str, targets: Mapping[str, Target]) -> None:
    for name, target in targets.items():
        if name.startswith(f"{service}/"):
            run_many(target, COUNTS.get(name, COUNT))


def test_a_router_generates_as_before(targets: Mapping[str, Target], cluster: LoopbackCluster) -> None:
    with Client(cluster.router_server.address) as client:
        expected = client.generate("import", max_new_tokens=4).text()
        for name in ("RouterService/Generate", "RouterService/Cancel"):
            run_many(targets[name], COUNTS["RouterService/Generate"] // 2, seed=1)
        assert client.generate("import", max_new_tokens=4).text() == expected
    assert (cluster.router.status().running, cluster.router.status().waiting) == (0, 0)
