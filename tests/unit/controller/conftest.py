"""Fixtures for tests of whole controllers: a tiny checkpoint, two actors in this process, and controllers."""

from collections.abc import Iterator

import pytest

from tests.support.clusters.controllers import ACTORS, MakeController, controllers_over
from tests.support.clusters.fake_actors import FakeActors, save_tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def actors() -> Iterator[FakeActors]:
    with FakeActors(ACTORS) as fakes:
        yield fakes


@pytest.fixture
def make(actors: FakeActors, checkpoint: str) -> Iterator[MakeController]:
    """Makes controllers over the actors, and closes them after the test."""
    with controllers_over(actors, checkpoint) as make_controller:
        yield make_controller
