"""Waits for what comes true by itself, with one bound for all: beside a busy machine everything takes its time."""

import time
from collections.abc import Callable

WAIT_S = 60.0


def wait_until(condition: Callable[[], object], what: str = "it") -> None:
    """Returns once the condition is true; fails the test after WAIT_S."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not come true"
        time.sleep(0.01)
