"""The default policy: shares follow the load at no price; replicas follow where that pays for their bytes."""

from dataclasses import dataclass

from moecluster.placement.decision import Decision, Observation, check_observation, decision_of
from moecluster.placement.layout import with_shares
from moecluster.placement.restore import restored
from moecluster.placement.shares import least_max_shares


@dataclass(frozen=True, kw_only=True)
class ShareState:
    """Nothing to remember: all that counts is in the observation."""


@dataclass(frozen=True, kw_only=True)
class SharePolicy:
    """Policy `share`. Raises ResourceError: fewer slots than experts; ConfigError: a budget below 0."""

    name: str = "share"

    def first_state(self) -> ShareState:
        return ShareState()

    def decide(self, seen: Observation, state: ShareState) -> tuple[Decision, ShareState]:
        check_observation(seen)
        standing = restored(seen.layout, seen.load_LE, seen.fleet)
        after = with_shares(standing, least_max_shares(standing, seen.load_LE, seen.fleet).share_R)
        reason = "shares follow the load"
        return decision_of(seen, after, reason), state
