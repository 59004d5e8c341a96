"""Holds the newest placement, and lets threads wait for a newer one."""

import threading
import time

from moecluster.errors import Unavailable
from moecluster.types import NO_PLACEMENT, Placement, PlacementNumber


class PlacementBoard:
    """Holds the newest placement. Thread-safe; every wait is finite."""

    def __init__(self) -> None:
        self._placement: Placement | None = None
        self._closed = False
        self._changed = threading.Condition()

    @property
    def number(self) -> PlacementNumber:
        """Number of the newest placement; NO_PLACEMENT before the first."""
        placement = self._placement
        return placement.number if placement is not None else NO_PLACEMENT

    def publish(self, placement: Placement) -> bool:
        """Sets the newest placement. Returns False, without a change, if the held one is as new or newer."""
        with self._changed:
            if placement.number <= self.number:
                return False
            self._placement = placement
            self._changed.notify_all()
            return True

    def current(self, timeout_s: float) -> Placement:
        """Returns the newest placement, waiting for the first one. Raises Unavailable after the timeout."""
        placement = self._placement or self.newer_than(NO_PLACEMENT, timeout_s)
        if placement is None:
            raise Unavailable(f"no placement came from the controller in {timeout_s:g} s")
        return placement

    def newer_than(self, number: PlacementNumber, timeout_s: float) -> Placement | None:
        """Waits for a placement with a higher number; None after the timeout, or once closed."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while self.number <= number and not self._closed:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)
            return self._placement if self.number > number else None

    def close(self) -> None:
        """Ends all waits, now and later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
