"""Two fake routers."""

from collections.abc import Iterator

import pytest

from tests.support.fakes.fake_router import FakeRouter


@pytest.fixture
def first() -> Iterator[FakeRouter]:
    with FakeRouter("first") as serving:
        yield serving


@pytest.fixture
def second() -> Iterator[FakeRouter]:
    with FakeRouter("second") as serving:
        yield serving
