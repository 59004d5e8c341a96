"""A small model's experts, and an expert service that serves them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from moecluster.expert.service import ExpertService
from tests.support.expert.small_actor import load_modules, save_small_model, serving


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def modules(checkpoint: Path) -> dict[int, nn.Module]:
    return load_modules(checkpoint)


@pytest.fixture
def service(checkpoint: Path) -> Iterator[ExpertService]:
    with serving(checkpoint) as service:
        yield service
