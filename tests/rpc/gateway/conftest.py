"""Fake routers, and a gateway before one of them."""

from collections.abc import Iterator

import pytest

from tests.support.clusters.running_gateway import RunningGateway, running_gateway
from tests.support.fakes.fake_router import FakeRouter


@pytest.fixture(scope="module")
def router() -> Iterator[FakeRouter]:
    with FakeRouter() as serving:
        yield serving


@pytest.fixture(scope="module")
def gateway(router: FakeRouter) -> Iterator[RunningGateway]:
    with running_gateway([router.address]) as serving:
        yield serving


@pytest.fixture
def first() -> Iterator[FakeRouter]:
    with FakeRouter("first") as serving:
        yield serving


@pytest.fixture
def second() -> Iterator[FakeRouter]:
    with FakeRouter("second") as serving:
        yield serving
