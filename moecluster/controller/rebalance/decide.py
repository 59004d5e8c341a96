"""Runs the policy on the current observation, and finds which replicas its decision changes."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecluster.controller.context import ControllerContext
from moecluster.controller.rebalance.observe import Observer, Seen, with_budget
from moecluster.placement.layout import Layout, added_R
from moecluster.placement.names import Names, to_replicas
from moecluster.placement.policy.interface import Decision, Policy
from moecluster.placement.policy.registry import policy_named
from moecluster.types import ExpertId, PlanPreview, Replica

WHATEVER_BYTES = 2.0**62
LayerReplicas = Mapping[int, tuple[Replica, ...]]  # layer -> all its replicas


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a decision changes."""

    decision: Decision
    target: LayerReplicas  # the layers that change
    moves: bool  # replicas are added or removed; otherwise only shares change


class Planner:
    """Thread-safe, except that only one thread may call decide and fill, which change the policy's state."""

    def __init__(self, context: ControllerContext, policy: str, observer: Observer) -> None:
        self.observer = observer
        self._policy: Policy[Any] = policy_named(policy)
        self._state = self._policy.first_state()
        self._clock = context.clock
        self.decided_s: float | None = None  # when the policy last looked at the load; None: not yet
        self._looking = threading.Lock()  # held while the observer is used

    def read(self) -> None:
        """Reads the load source."""
        with self._looking:
            self.observer.read(self._clock())

    def seen(self) -> Seen:
        """Returns the current observation."""
        with self._looking:
            return self.observer.observe(self._clock())

    def idle_experts(self, idle_s: float) -> frozenset[ExpertId]:
        """Returns the experts that no token was routed to for idle_s."""
        with self._looking:
            return self.observer.idle_experts(idle_s)

    def decide(self, seen: Seen) -> Change:
        """Returns what the cluster's policy decides. Raises UserError if there are fewer slots than experts."""
        decision, self._state = self._policy.decide(seen.observation, self._state)
        self.decided_s = self._clock()
        return _change(seen, decision)

    def fill(self) -> Change:
        """Decides on the current observation without a byte budget."""
        return self.decide(with_budget(self.seen(), WHATEVER_BYTES))

    def preview(self, policy: str) -> PlanPreview:
        """Returns what a policy (empty: the cluster's own) would do now. Raises ConfigError for an unknown policy."""
        asked = policy_named(policy) if policy else self._policy
        seen = self.seen()
        state = self._state if asked is self._policy else asked.first_state()
        decision, _ = asked.decide(seen.observation, state)
        before, after = _by_place(seen.observation.layout, seen.names), _by_place(decision.layout, seen.names)
        return PlanPreview(
            policy=asked.name,
            reason=decision.reason,
            balancedness_before=decision.balancedness_before,
            balancedness_after=decision.balancedness_after,
            moved_bytes=decision.moved_bytes,
            added=tuple(r for key, r in after.items() if key not in before),
            removed=tuple(r for key, r in before.items() if key not in after),
            changed_shares=sum(abs(after[k].share - before[k].share) > 1e-6 for k in after.keys() & before.keys()),
        )


def _by_place(layout: Layout, names: Names) -> dict[tuple[ExpertId, str], Replica]:
    return {(r.expert, r.actor): r for replicas in to_replicas(layout, names).values() for r in replicas}


def _change(seen: Seen, decision: Decision) -> Change:
    before = to_replicas(seen.observation.layout, seen.names)
    after = to_replicas(decision.layout, seen.names)
    same_count = decision.layout.num_replicas == seen.observation.layout.num_replicas
    return Change(
        decision=decision,
        target={layer: after[layer] for layer in after if after[layer] != before[layer]},
        moves=not same_count or bool(added_R(seen.observation.layout, decision.layout).any()),
    )
