"""What several tests of the Compute stream start from."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What must be given back at once may not wait for the collector of cycles, which sees no memory but Python's."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
