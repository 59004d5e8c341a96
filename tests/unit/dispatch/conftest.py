"""A small model's experts."""

from pathlib import Path

import pytest
from torch import nn

from tests.support.expert.small_actor import load_modules, save_small_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def modules(checkpoint: Path) -> dict[int, nn.Module]:
    return load_modules(checkpoint)
