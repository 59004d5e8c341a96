"""Interfaces of the controller to routers, training and operators."""

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
    """Where a router gets the placement from: the controller's stream, or a fixed placement."""

    def current(self, timeout_s: float) -> Placement:
        """Returns the newest placement, waiting for the first one. Raises Unavailable after the timeout."""

    def newer_than(self, number: PlacementNumber, timeout_s: float) -> Placement | None:
        """Waits for a placement with a higher number; None after the timeout."""

    def report_failure(self, actor: str, incarnation: str, reason: str) -> None:
        """Reports that an actor did not answer. Never blocks, never raises."""

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        """Reports that an actor's replica of an expert returned NaN or infinity. Never blocks, never raises.

        placement: (term, generation) that the request was routed by.
        """


class ControllerLink(PlacementSource, Protocol):
    """A router's link to the controller: placements in, reports out."""

    def want_experts(self, layer: int, experts: Sequence[int]) -> None:
        """Reports that tokens wait for experts of a layer that have no replica. Never blocks, never raises."""


class PlacementHold(Protocol):
    """Holds the placement while experts are trained."""

    def hold(self, timeout_s: float) -> None:
        """Returns once the placement is held. Raises DeadlineExceeded otherwise, and releases it."""

    def release(self) -> None:
        """Lets the placement change again. Does nothing if it was not held."""


class ControllerHandler(PlacementSource, Protocol):
    """The implementation behind the service. A UserError of any call reaches the caller as it is."""

    lease_s: float

    def renew_lease(self, router: str, applied: PlacementNumber, *, hold: bool, state: RouterState) -> None:
        """Renews the lease of a router that has applied this placement. hold: it trains, so the placement must not
        change. state: as the router reports it."""

    def report_nonfinite(self, actor: str, incarnation: str, expert: ExpertId, placement: PlacementNumber) -> None:
        """A router received NaN or infinity from an actor's replica. placement: that it routed by."""

    def report_load(self, router: str, load: LoadSnapshot) -> None:
        """What a router counted in its last window."""

    def want_experts(self, router: str, experts: Sequence[ExpertId]) -> None:
        """A router has tokens for experts without a replica. Does not wait until they are loaded."""

    def set_checkpoint(self, checkpoint: str) -> None:
        """Sets the directory that lost experts are loaded from."""

    def status(self) -> ControllerStatus:
        """Returns the cluster as the controller sees it."""

    def loads(self) -> ClusterLoads:
        """Returns what was counted since the controller started."""

    def scale(self, expert_actors: int, *, operation_id: str) -> Operation:
        """Requests a number of expert actors. operation_id: empty, or chosen by the caller. A known id returns its
        operation and requests nothing new (UserError if that is a different request)."""

    def scale_routers(self, routers: int, *, operation_id: str) -> Operation:
        """Requests a number of routers. operation_id as in scale."""

    def drain(self, node: str, *, operation_id: str) -> Operation:
        """Requests that a node, or one expert actor, be drained. operation_id as in scale."""

    def place(self, expert: ExpertId, actors: Sequence[str], *, operation_id: str) -> Operation:
        """Requests replicas of an expert on exactly these actors; none: the expert is cold. operation_id as in
        scale."""

    def update(self, checkpoint: str, *, operation_id: str) -> Operation:
        """Requests that all weights be replaced by those of a directory. operation_id as in scale."""

    def plan(self, policy: str) -> PlanPreview:
        """Returns what a policy (empty: the cluster's own) would do now, without doing it."""

    def operation(self, operation_id: str) -> Operation:
        """Returns an operation in its current state. Raises UserError for an unknown id."""

    def operations(self, limit: int) -> tuple[Operation, ...]:
        """Returns at most limit operations, newest first; 0: all that are kept."""

    def shut_down(self) -> None:
        """Begins to end every process of the cluster, this one last. Does nothing if it has begun already."""
