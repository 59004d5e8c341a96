"""The interface of a policy: pure functions of an observation, with the time passed in."""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from moecluster.errors import ConfigError
from moecluster.placement.layout import Bools, Fleet, Floats, Layout, moved_bytes, without
from moecluster.placement.names import mean_balancedness

StateT = TypeVar("StateT")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The cluster at one moment."""

    now_s: float
    load_LE: Floats  # assignments per second from the load window; 0 beyond a layer's experts
    fleet: Fleet
    layout: Layout  # the current one; experts whose last replica is lost have no replicas
    budget_bytes: float  # bytes that a decision may load; replicas of lost experts are loaded regardless
    burst: float = 0.0  # budgets that may be borrowed from later decisions; 0: none
    cold_LE: Bools | None = None  # experts that stay without replicas until a token needs them; None: none
    load_counted: bool = True  # False: no token was counted yet, and load_LE is a guess


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The layout to reach. Equal to the current layout if no change is worth its cost."""

    layout: Layout
    reason: str  # one line for `explain`
    balancedness_before: float | None  # of the current layout under the observed load; None: no load counted
    balancedness_after: float | None  # predicted, of the new layout
    moved_bytes: float


USUAL_BURST = 3.0  # the default of controller.move_burst


class Policy(Protocol, Generic[StateT]):
    """Decides from an observation and from its own state, which is a frozen record."""

    @property
    def name(self) -> str:
        """The name in `policies`."""

    def first_state(self) -> StateT:
        """The state before the first decision."""

    def decide(self, seen: Observation, state: StateT) -> tuple[Decision, StateT]:
        """Returns the decision, and the state for the next call."""


def check_observation(seen: Observation) -> None:
    """Raises ConfigError for a budget below 0; asserts the shapes, which are internal invariants."""
    if not seen.budget_bytes >= 0:
        raise ConfigError(f"controller.move_budget_bytes: got {seen.budget_bytes:g}, expected at least 0 (shares only)")
    assert seen.load_LE.shape == (seen.layout.num_layers, seen.layout.max_experts), seen.load_LE.shape
    assert len(seen.fleet.speed_A) == len(seen.fleet.node_A) == seen.fleet.num_actors
    assert (seen.fleet.speed_A > 0).all()


def decision_of(seen: Observation, after: Layout, reason: str) -> Decision:
    """Returns a decision with its figures. Cold experts stay without replicas, even if the plan places some."""
    if seen.cold_LE is not None and seen.cold_LE.any():
        cold_R = seen.cold_LE.reshape(-1)[after.expert_key_R]
        after = without(after, cold_R) if cold_R.any() else after
    return Decision(
        layout=after,
        reason=reason,
        balancedness_before=_balancedness(seen.layout, seen),
        balancedness_after=_balancedness(after, seen),
        moved_bytes=moved_bytes(seen.layout, after, seen.fleet),
    )


def _balancedness(layout: Layout, seen: Observation) -> float | None:
    return mean_balancedness(layout, seen.load_LE, seen.fleet) if seen.load_counted else None
