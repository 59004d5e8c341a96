"""Interfaces of the controller, as routers, training and operators see it."""

from collections.abc import Sequence
from typing import Protocol

from moecluster.types import (
    ClusterLoads,
    ControllerStatus,
    ExpertId,
    LoadSnapshot,
    Operation,
    Placement,
    PlacementNumber,
    PlanPreview,
    RouterState,
)


class PlacementSource(Protocol):
    """Where a router learns the placement: the controller's stream, or a fixed one."""

    def current(self, timeout_s: float) -> Placement:
        """The newest placement; waits for a first one. Raises Unavailable after the timeout."""

    def newer_than(self, number: PlacementNumber, timeout_s: float) -> Placement | None:
        """Waits for a placement with a higher number; None after the timeout."""

    def report_failure(self, actor: str, incarnation: str, reason: str) -> None:
        """Says that an actor did not answer. Never blocks, never raises."""

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        """Says that an actor's replica of an expert answers NaN or infinity. Never blocks, never raises.

        placement: (term, generation) by which it was asked.
        """


class ControllerLink(PlacementSource, Protocol):
    """A router's way to the controller: the placements, and what the router has to tell."""

    def want_experts(self, layer: int, experts: Sequence[int]) -> None:
        """Says that tokens wait for experts of a layer that stand nowhere. Never blocks, never raises."""


class PlacementHold(Protocol):
    """What keeps the placement as it is while experts are trained."""

    def hold(self, timeout_s: float) -> None:
        """Returns when the current placement stays as it is. Raises DeadlineExceeded otherwise, and lets go."""

    def release(self) -> None:
        """The placement may change again. Fine if nothing was held."""


class ControllerHandler(PlacementSource, Protocol):
    """What stands behind the service. A UserError of any call reaches the caller as it is."""

    lease_s: float

    def renew_lease(self, router: str, applied: PlacementNumber, *, hold: bool, state: RouterState) -> None:
        """A router is there, and has applied this placement. hold: it trains, so the placement must stay. state: what
        it says of itself."""

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        """A router had NaN or infinity of an actor's replica. placement: by which it asked."""

    def report_load(self, router: str, load: LoadSnapshot) -> None:
        """What a router counted in its last window."""

    def want_experts(self, router: str, experts: Sequence[ExpertId]) -> None:
        """A router has tokens for experts that stand nowhere. Does not wait until they are loaded."""

    def set_checkpoint(self, checkpoint: str) -> None:
        """Lost experts are loaded from this directory from now on."""

    def status(self) -> ControllerStatus:
        """The cluster as the controller sees it."""

    def loads(self) -> ClusterLoads:
        """What was counted since the controller began."""

    def scale(self, expert_actors: int, *, operation_id: str) -> Operation:
        """Begins to make it so many actors. operation_id: empty, or one that a caller chose: known, it is not begun
        again but returned (UserError if it asked for something else)."""

    def scale_routers(self, routers: int, *, operation_id: str) -> Operation:
        """Begins to make it so many routers. operation_id as in scale."""

    def drain(self, node: str, *, operation_id: str) -> Operation:
        """Begins to empty a node, or one expert actor. operation_id as in scale."""

    def place(self, expert: ExpertId, actors: Sequence[str], *, operation_id: str) -> Operation:
        """Begins to let an expert stand on exactly these actors; none: nowhere. operation_id as in scale."""

    def update(self, checkpoint: str, *, operation_id: str) -> Operation:
        """Begins to replace all weights by those of a directory. operation_id as in scale."""

    def plan(self, policy: str) -> PlanPreview:
        """What a policy would do now; empty: the cluster's own. Does nothing."""

    def operation(self, operation_id: str) -> Operation:
        """How an operation stands. Raises UserError if it is not known."""

    def operations(self, limit: int) -> tuple[Operation, ...]:
        """The newest operations first, at most limit; 0: all that are kept."""
