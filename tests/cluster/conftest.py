"""Models that the clusters serve."""

import pytest

from tests.support.clusters.fake_actors import save_tiny_model
from tests.support.soak.generation_load import save_decided_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Each prompt has a greedy output of its own."""
    return save_decided_model(tmp_path_factory.mktemp("model"))
