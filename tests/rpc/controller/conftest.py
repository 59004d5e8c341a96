"""Fixtures for tests of controllers over gRPC."""

from collections.abc import Iterator

import pytest

from tests.support.clusters.changing_cluster import StartCluster, changing_clusters
from tests.support.clusters.fake_actors import save_tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(checkpoint: str) -> Iterator[StartCluster]:
    """Starts clusters, and ends them."""
    with changing_clusters(checkpoint) as start_cluster:
        yield start_cluster
