"""A tiny model, and a cluster in this process that serves it."""

from collections.abc import Iterator

import pytest

from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.clusters.loopback_cluster import LoopbackCluster


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster(checkpoint: str) -> Iterator[LoopbackCluster]:
    with LoopbackCluster(checkpoint) as running:
        yield running
