"""What a policy is asked, and what it answers: pure functions of what was seen, with the time passed in."""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from moecluster.placement.layout import Fleet, Floats, Layout

StateT = TypeVar("StateT")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The cluster at one moment."""

    now_s: float
    load_LE: Floats  # assignments per second, as the load window has them; 0 beyond a layer's experts
    fleet: Fleet
    layout: Layout  # the standing one; experts whose last replica is lost have none
    budget_bytes: float  # most that this decision may load; replicas of lost experts are loaded regardless
    coactivation_LEE: Floats | None = None  # tokens per second that go to both experts; None: not known


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What shall stand. Equal to the standing layout if nothing is worth its price."""

    layout: Layout
    reason: str  # one line for `explain`
    balancedness_before: float  # mean over layers, of the standing layout under the seen load
    balancedness_after: float  # predicted, of the new one
    moved_bytes: float


class Policy(Protocol, Generic[StateT]):
    """Decides from what was seen and from its own state, which is a frozen record."""

    name: str

    def first_state(self) -> StateT:
        """The state before the first decision."""

    def decide(self, seen: Observation, state: StateT) -> tuple[Decision, StateT]:
        """What shall stand, and the state for the next call."""
