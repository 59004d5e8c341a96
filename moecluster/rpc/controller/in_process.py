"""A placement without a controller."""

import threading
from collections.abc import Sequence

from moecluster.types import ExpertId, Placement, PlacementNumber


class FixedPlacement:
    """A placement that never changes, for tests and single hosts."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self.failures: list[tuple[str, str, str]] = []

    def current(self, timeout_s: float) -> Placement:
        return self._placement

    def newer_than(self, number: PlacementNumber, timeout_s: float) -> Placement | None:
        threading.Event().wait(min(timeout_s, 0.05))
        return None

    def report_failure(self, actor: str, incarnation: str, reason: str) -> None:
        self.failures.append((actor, incarnation, reason))

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        self.failures.append((actor, incarnation, f"{expert} answers NaN or infinity"))

    def want_experts(self, layer: int, experts: Sequence[int]) -> None:
        """Does nothing: without a controller, nothing is loaded."""

    def hold(self, timeout_s: float) -> None:
        """Does nothing: the placement never changes."""

    def release(self) -> None:
        """Does nothing: the placement never changes."""
