"""A placement policy of your own, replayed on a recorded trace beside the built-in ones. No cluster is needed.

    moecluster record loads.jsonl --window-s 10 --for-s 3600     # of a cluster that is up
    python examples/custom_policy.py loads.jsonl

The policy below changes nothing while the actors are balanced enough. To run a policy in a cluster, add it to
moecluster/placement/policy/registry.py and set controller.policy.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moecluster.errors import MoeClusterError
from moecluster.placement.layout import with_shares
from moecluster.placement.load.window import ExponentialWindow
from moecluster.placement.names import mean_balancedness
from moecluster.placement.plan.restore import restored
from moecluster.placement.plan.shares import least_max_shares
from moecluster.placement.policy.interface import Decision, Observation, Policy, check_observation, decision_of
from moecluster.placement.policy.registry import policy_named
from moecluster.simulation.layouts import usual_budget_bytes
from moecluster.simulation.replay import Replay, ReplaySummary, replay_fleet, summarize
from moecluster.simulation.trace.reader import Trace, open_trace


@dataclass(frozen=True, kw_only=True)
class LazyState:
    """What the policy remembers from one decision to the next: nothing."""


@dataclass(frozen=True, kw_only=True)
class LazyPolicy:
    """Leaves the placement alone while it is balanced enough; then it re-solves the shares, and moves no weights."""

    name: str = "lazy"
    enough: float = 0.95  # balancedness: mean actor load / max actor load

    def first_state(self) -> LazyState:
        return LazyState()

    def decide(self, seen: Observation, state: LazyState) -> tuple[Decision, LazyState]:
        """Pure: all that it knows is in `seen` and in its own state."""
        check_observation(seen)
        # Lost experts must be restored and drained actors emptied, whatever a policy thinks of balance.
        layout = restored(seen.layout, seen.load_LE, seen.fleet, seen.cold_LE)
        balancedness = mean_balancedness(layout, seen.load_LE, seen.fleet)
        if balancedness is None or balancedness >= self.enough:
            return decision_of(seen, layout, "balanced enough"), state
        shares = least_max_shares(layout, seen.load_LE, seen.fleet).share_R
        return decision_of(seen, with_shares(layout, shares), f"balancedness was {balancedness:.3f}"), state


def replay(trace: Trace, policy: Policy[Any], slots: int | None) -> ReplaySummary:
    """Replays a trace under a policy, on the actors that it was recorded on."""
    fleet, actors = replay_fleet(trace.header, num_actors=None, slots=slots)
    experts = {layer.layer: layer.experts for layer in trace.header.layers}
    window = ExponentialWindow(experts, half_life_s=trace.header.window_s)
    replaying = Replay(trace.header, policy, fleet, actors, window, budget_bytes=usual_budget_bytes(fleet))
    return summarize(policy.name, [replaying.step(seen) for seen in trace.windows()])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Replay a trace under a policy of your own and the built-in ones.")
    parser.add_argument("trace", help="as moecluster record writes it")
    parser.add_argument("--slots", type=int, help="replicas of each layer that an actor has room for")
    given = parser.parse_args(arguments)
    try:
        trace = open_trace(given.trace)
        policies = (LazyPolicy(), policy_named("static"), policy_named("eplb"), policy_named("share"))
        print(f"{'policy':15}{'balancedness':>14}{'worst':>8}{'moved MB':>10}")
        for policy in policies:
            summary = replay(trace, policy, given.slots)
            mean, worst = summary.mean_balancedness or 0.0, summary.worst_balancedness or 0.0
            print(f"{policy.name:15}{mean:14.4f}{worst:8.3f}{summary.moved_bytes / 1e6:10.2f}")
    except MoeClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
