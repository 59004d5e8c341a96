"""The policy `static`: only restores lost experts and empties drained actors."""

from dataclasses import dataclass

from moecluster.placement.plan.restore import restored
from moecluster.placement.policy.interface import Decision, Observation, check_observation, decision_of


@dataclass(frozen=True, kw_only=True)
class StaticState:
    """No state."""


@dataclass(frozen=True, kw_only=True)
class StaticPolicy:
    """Policy `static`. Raises ResourceError for fewer slots than experts, ConfigError for a budget below 0."""

    name: str = "static"

    def first_state(self) -> StaticState:
        return StaticState()

    def decide(self, seen: Observation, state: StaticState) -> tuple[Decision, StaticState]:
        check_observation(seen)
        after = restored(seen.layout, seen.load_LE, seen.fleet, seen.cold_LE)
        reason = "nothing to do" if after is seen.layout else "experts restored, or moved off drained actors"
        return decision_of(seen, after, reason), state
