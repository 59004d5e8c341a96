"""The default policy: shares follow the load for free; replicas move where the gain pays for their bytes."""

from dataclasses import dataclass, field

import numpy as np

from moecluster.placement.layout import Floats, Layout, moved_bytes, with_shares
from moecluster.placement.load.forecast import Trend, forecast
from moecluster.placement.names import balancedness_L
from moecluster.placement.plan.incremental import MoveSettings, with_moves
from moecluster.placement.plan.restore import restored
from moecluster.placement.plan.shares import least_max_shares
from moecluster.placement.plan.spares import with_spares_moved
from moecluster.placement.policy.interface import Decision, Observation, check_observation, decision_of


@dataclass(frozen=True, kw_only=True)
class ShareSettings:
    """How eagerly the policy acts."""

    min_share_gain: float = 0.0005  # least gain of mean balancedness for which only shares are changed
    spare_moves_a_layer: int = 2  # most spare replicas of a layer that one decision places or moves
    moves: MoveSettings = field(default_factory=MoveSettings)


@dataclass(frozen=True, kw_only=True)
class ShareState:
    """State carried over from earlier decisions."""

    trend: Trend | None = None  # of the load so far; None before the first decision
    debt_bytes: float = 0.0  # bytes loaded beyond the budgets so far; deducted from later budgets


@dataclass(frozen=True, kw_only=True)
class SharePolicy:
    """Policy `share`, in this order: lost experts and drained actors; shares; moves that pay; spare replicas.

    It plans for the load forecast for the next decision. Under a constant load it settles: where the gain is too small
    it returns the current layout. When more moves pay than the budget allows, as after a sudden shift of topic, it
    borrows from later budgets: n consecutive decisions load at most n budgets plus the burst. Replicas of lost experts,
    and of experts on drained actors, do not count against the budget.
    Raises ResourceError for fewer slots than experts, ConfigError for a budget below 0.
    """

    name: str = "share"
    settings: ShareSettings = field(default_factory=ShareSettings)

    def first_state(self) -> ShareState:
        return ShareState()

    def decide(self, seen: Observation, state: ShareState) -> tuple[Decision, ShareState]:
        check_observation(seen)
        load_LE, trend = forecast(seen.load_LE, state.trend)
        complete = restored(seen.layout, load_LE, seen.fleet, seen.cold_LE)
        shared = least_max_shares(complete, load_LE, seen.fleet, even=True)
        reshared = with_shares(complete, shared.share_R)
        after = self._with_optional_moves(reshared, seen, load_LE, state.debt_bytes)
        spent_bytes = moved_bytes(reshared, after, seen.fleet)
        debt_bytes = max(state.debt_bytes + spent_bytes - seen.budget_bytes, 0.0)
        reason = _reason(seen.layout, complete, reshared, after)
        if after is reshared:  # the replicas stay: are the new shares worth publishing?
            gain = balancedness_L(reshared, load_LE, seen.fleet) - balancedness_L(complete, load_LE, seen.fleet)
            if np.nansum(gain) < self.settings.min_share_gain * max(len(gain), 1):
                after = complete
                reason = "as even as it gets" if complete is seen.layout else reason
        return decision_of(seen, after, reason), ShareState(trend=trend, debt_bytes=debt_bytes)

    def _with_optional_moves(self, layout: Layout, seen: Observation, load_LE: Floats, debt_bytes: float) -> Layout:
        if seen.budget_bytes <= 0 or not layout.num_replicas:
            return layout
        fleet, settings = seen.fleet, self.settings
        most_bytes = max(seen.budget_bytes * (1 + seen.burst) - debt_bytes, 0.0)
        moved = with_moves(layout, load_LE, fleet, most_bytes, settings.moves)
        left_bytes = seen.budget_bytes - debt_bytes - moved_bytes(layout, moved, fleet)  # spares never borrow
        return with_spares_moved(moved, load_LE, fleet, left_bytes, settings.spare_moves_a_layer)


def _reason(seen: Layout, complete: Layout, reshared: Layout, after: Layout) -> str:
    """Returns one line on what was done, in the order of urgency."""
    parts = []
    if complete is not seen:
        parts.append("experts restored, or moved off drained actors")
    if after is not reshared:
        parts.append("replicas added or moved where shares alone do not suffice")
    return "; ".join([*parts, "shares follow the load"])
