"""Models tokens as a fluid that queues for, and flows through, all MoE layers of a model: the simulator's delays.

A step takes a batch of tokens through the layers one after the other; each layer takes as long as its slowest actor.
Tokens that arrive during a step form the next batch (continuous batching), up to a maximum size. So the batch size is
where arrivals match the step time, and beyond the maximum size a backlog grows. The model is exact while nothing
changes.
"""

from dataclasses import dataclass

import numpy as np

from moecluster.placement.layout import Fleet, Floats, Layout
from moecluster.simulation.costs import Costs


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Cost of a step on each actor: fixed_LA + tokens * per_token_LA seconds, plus base_s once."""

    base_s: float
    fixed_LA: Floats
    per_token_LA: Floats

    def step_s(self, tokens: float) -> tuple[float, float]:
        """Returns the time of a step with this many tokens, and its slope per token: a convex function."""
        time_LA = self.fixed_LA + self.per_token_LA * tokens
        slowest_L = time_LA.argmax(axis=1)
        layers = np.arange(len(slowest_L))
        growth = float(self.per_token_LA[layers, slowest_L].sum())
        return self.base_s + float(time_LA[layers, slowest_L].sum()), growth


def step_costs(layout: Layout, pairs_LE: Floats, fleet: Fleet, link_A: Floats, costs: Costs) -> StepCosts:
    """Returns the costs of a layout.

    pairs_LE: (row, expert) pairs that a token sends to each expert, so a layer's sum is top-k. link_A: bytes per second
    available on each actor's link. Every pair counts as a row of its own on the link, and every replica with a share
    as touched: true for large batches on many actors, and an upper bound otherwise.
    """
    shape = (layout.num_layers, fleet.num_actors)
    key_R = layout.layer_R * fleet.num_actors + layout.actor_R
    pairs_R = pairs_LE.reshape(-1)[layout.expert_key_R] * layout.share_R
    pairs_LA = np.bincount(key_R, weights=pairs_R, minlength=shape[0] * shape[1]).reshape(shape)
    touched_LA = np.bincount(key_R, weights=pairs_R > 0, minlength=shape[0] * shape[1]).reshape(shape)
    return StepCosts(
        base_s=costs.message_s * layout.num_layers,
        fixed_LA=touched_LA * (costs.expert_s / fleet.speed_A),
        per_token_LA=pairs_LA * (costs.row_s / fleet.speed_A + costs.row_bytes / link_A),
    )


def steady_batch(costs: StepCosts, tokens_per_s: float, most_tokens: float) -> float:
    """Returns the tokens per step at which a step takes as long as they take to arrive; at most most_tokens.

    Newton from zero on a concave function: each step lands at or before the root, and on one of finitely many lines.
    """
    tokens = 0.0
    while True:
        step_s, growth = costs.step_s(tokens)
        missing = tokens_per_s * step_s - tokens
        slope = 1.0 - tokens_per_s * growth
        if missing <= 1e-9 * (1.0 + tokens):
            return tokens
        if slope <= 0 or tokens + missing / slope >= most_tokens:
            return most_tokens
        tokens += missing / slope


@dataclass(frozen=True, kw_only=True)
class Served:
    """Totals over some time. Sums, so that times add up."""

    seconds: float = 0.0
    tokens: float = 0.0
    step_seconds: float = 0.0  # sum over the tokens of the time of the step that took them
    waited: float = 0.0  # time that tokens spent waiting, summed over tokens, as it passes

    def __add__(self, other: "Served") -> "Served":
        return Served(
            seconds=self.seconds + other.seconds,
            tokens=self.tokens + other.tokens,
            step_seconds=self.step_seconds + other.step_seconds,
            waited=self.waited + other.waited,
        )


class FluidQueue:
    """Tokens that arrived and are not yet served.

    backlog: can be served, and waits its turn. held: waits for an expert that no actor holds; it joins the backlog when
    every expert has a replica again, since a token needs all layers.
    """

    def __init__(self, most_tokens: float) -> None:
        self._most_tokens = most_tokens
        self.backlog = 0.0
        self.held = 0.0

    def advance(self, seconds: float, tokens_per_s: float, available: float, costs: StepCosts) -> Served:
        """Lets time pass. available: the fraction of tokens that need no lost expert."""
        if available >= 1.0:
            self.backlog, self.held = self.backlog + self.held, 0.0
        held_before = self.held
        held_per_s = tokens_per_s * (1.0 - available)
        self.held += held_per_s * seconds
        waited = (held_before + self.held) / 2 * seconds
        came_per_s = tokens_per_s * available
        full_step_s, _ = costs.step_s(self._most_tokens)
        capacity_per_s = self._most_tokens / full_step_s
        if self.backlog > 0 or came_per_s > capacity_per_s:
            busy_s = self._busy_s(seconds, came_per_s, capacity_per_s)
            left = max(self.backlog + (came_per_s - capacity_per_s) * busy_s, 0.0)
            waited += (self.backlog + left) / 2 * busy_s
            self.backlog = left
        else:
            busy_s = 0.0
        steady_s = seconds - busy_s
        step_s, _ = costs.step_s(steady_batch(costs, came_per_s, self._most_tokens))
        full, steady = capacity_per_s * busy_s, came_per_s * steady_s
        return Served(
            seconds=seconds,
            tokens=full + steady,
            step_seconds=full * full_step_s + steady * step_s,
            waited=waited,
        )

    def _busy_s(self, seconds: float, came_per_s: float, capacity_per_s: float) -> float:
        """Returns how long steps are full: until the backlog is gone, if it ever is."""
        if came_per_s >= capacity_per_s:
            return seconds
        return min(seconds, self.backlog / (capacity_per_s - came_per_s))
