"""The simulator's records: scenarios, decisions, windows and summaries."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from moecluster.errors import ConfigError
from moecluster.placement.layout import Fleet
from moecluster.simulation.costs import Costs


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What to simulate. Decisions are made at the ends of windows, and when an actor dies or returns."""

    window_s: float = 60.0
    decide_every: int = 5  # windows
    load_half_life_s: float = 300.0  # of the load window that decisions use
    budget_bytes: (
        float  # that a decision may load, or borrow from later ones; the first plan, into a cold cluster, is free
    )
    most_tokens_per_actor: float = 256.0  # per step: the largest batch is this times the number of actors
    move_link_part: float = 0.25  # part of a link's bandwidth that copies take while they run
    actor_mtbf_hours: float = 1000.0  # of one actor; Llama 3's GPUs had about 50,000 (arXiv 2407.21783, section 3.3.4)
    whole_node_part: float = 0.2  # fraction of deaths that take all actors of the node
    detect_s: float = 1.0  # from a death to its detection by the controller
    restart_s: float = 11.0  # from a death to an empty actor in its place
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SimulatedDecision:
    """One decision."""

    time_s: float
    cause: str  # period | death | return
    reason: str
    observe_s: float  # measured: adding the routers' counters of one window
    decide_s: float  # measured: the planner's own time
    apply_s: float  # simulated: until the last copy is in place
    moved_bytes: float
    balancedness_before: float | None  # as the policy observes it
    balancedness_after: float | None  # as the policy predicts it


@dataclass(frozen=True, kw_only=True)
class SimulatedWindow:
    """One window as users and the cluster experienced it. Means are over time."""

    time_s: float  # its end
    tokens_per_s: float  # arrived; none before the first plan is in place
    served_per_s: float
    step_s: float | None  # mean time of a token's pass through all MoE layers; None: none was served
    wait_s: float | None  # mean time that a token waited for its step; None: none was served
    balancedness: float | None  # None: no replica carried load
    availability: float  # fraction of the tokens that needed no lost expert
    replicas: int
    actors: int  # alive
    deaths: int
    moved_bytes: float
    decisions: tuple[SimulatedDecision, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SimulationSummary:
    """A whole simulation in one record."""

    windows: int
    tokens: float
    served: float
    mean_balancedness: float | None  # after the first plan is in place, like all that follows
    mean_step_s: float | None  # over tokens, as the next four; None: none was served
    worst_step_s: float | None
    mean_wait_s: float | None
    worst_wait_s: float | None
    mean_availability: float
    deaths: int
    decisions: int
    cold_bytes: float  # of the first plan
    moved_bytes: float  # of all others
    median_observe_s: float
    median_decide_s: float
    max_decide_s: float
    controller_part: float  # fraction of one core's time spent observing and deciding


def balanced_tokens_per_s(fleet: Fleet, num_layers: int, top_k: int, costs: Costs, scenario: Scenario) -> float:
    """Returns the most that the fleet could serve if every layer were spread perfectly over all its actors."""
    most_tokens = scenario.most_tokens_per_actor * fleet.num_actors
    pairs = most_tokens * top_k
    rows_s = pairs * costs.row_s / fleet.speed_A.sum()
    link_s = pairs * costs.row_bytes / (fleet.num_actors * costs.link_bytes_per_s)
    weights_s = costs.expert_s * math.ceil(fleet.slots_A.mean())
    return float(most_tokens / (num_layers * (costs.message_s + weights_s + rows_s + link_s)))


def summarize(windows: Sequence[SimulatedWindow]) -> SimulationSummary:
    """Returns the summary. Raises ConfigError without a whole window after the first plan, or without tokens."""
    seconds = windows[-1].time_s / len(windows)
    decisions = [decision for window in windows for decision in window.decisions]
    open_s = decisions[0].time_s + decisions[0].apply_s if decisions else 0.0
    settled = [window for window in windows if window.time_s - seconds >= open_s]
    if not settled:
        raise ConfigError(
            f"the first plan would be in use {open_s:,.0f} s after the start, and only {windows[-1].time_s:,.0f} s are "
            "simulated; simulate more hours"
        )
    tokens = seconds * sum(window.tokens_per_s for window in windows)
    if not tokens > 0:
        raise ConfigError(
            "no token came while the first plan was in use: there is nothing to report; simulate more hours"
        )
    balance = [window.balancedness for window in settled if window.balancedness is not None]
    steps = [(window.step_s, window.served_per_s) for window in settled if window.step_s is not None]
    waits = [(window.wait_s, window.served_per_s) for window in settled if window.wait_s is not None]
    available = [(window.availability, window.tokens_per_s) for window in settled]
    moved = [decision.moved_bytes for decision in decisions]
    decide_s = [decision.decide_s for decision in decisions] or [0.0]
    observe_s = statistics.median([decision.observe_s for decision in decisions] or [0.0])
    return SimulationSummary(
        windows=len(windows),
        tokens=tokens,
        served=seconds * sum(window.served_per_s for window in windows),
        mean_balancedness=statistics.fmean(balance) if balance else None,
        mean_step_s=_weighted_mean(steps),
        worst_step_s=max((step_s for step_s, _ in steps), default=None),
        mean_wait_s=_weighted_mean(waits),
        worst_wait_s=max((wait_s for wait_s, _ in waits), default=None),
        mean_availability=_weighted_mean(available) or 0.0,
        deaths=sum(window.deaths for window in windows),
        decisions=len(decisions),
        cold_bytes=moved[0] if moved else 0.0,
        moved_bytes=sum(moved[1:]),
        median_observe_s=observe_s,
        median_decide_s=statistics.median(decide_s),
        max_decide_s=max(decide_s),
        controller_part=(len(windows) * observe_s + sum(decide_s)) / windows[-1].time_s,
    )


def _weighted_mean(values: Sequence[tuple[float, float]]) -> float | None:
    """Mean of (value, weight) pairs; None if the weights sum to 0."""
    weight = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / weight if weight > 0 else None
