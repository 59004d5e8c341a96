"""The baseline: the published plan of DeepSeek's EPLB (github.com/deepseek-ai/EPLB, its global form), in our own words.

Give one replica more, time and again, to the expert of the greatest load per replica; then place the replicas, heaviest
first, each on the actor of least load that has a slot free; tokens go to an expert's replicas alike. It is planned anew
at every decision, and knows neither what stands nor what a move costs.

Published for numbers that divide and equal actors; here slots may differ, and "least load" is load / speed. Where the
plan puts two replicas of an expert on one actor, they are one replica of twice the share.
"""

from dataclasses import dataclass

import numpy as np

from moecluster.placement.layout import Fleet, Floats, Ints, Layout, make_layout
from moecluster.placement.plan.replica_counts import minimax_counts
from moecluster.placement.plan.restore import check_room, restored
from moecluster.placement.policy.interface import Decision, Observation, check_observation, decision_of


@dataclass(frozen=True, kw_only=True)
class EplbState:
    """Nothing to remember."""


@dataclass(frozen=True, kw_only=True)
class EplbPolicy:
    """Policy `eplb`. Raises ResourceError: fewer slots than experts; ConfigError: a budget below 0.

    The published plan knows no budget, so none is kept, but that with a budget of 0 all stays as it stands.
    """

    name: str = "eplb"

    def first_state(self) -> EplbState:
        return EplbState()

    def decide(self, seen: Observation, state: EplbState) -> tuple[Decision, EplbState]:
        check_observation(seen)
        if seen.budget_bytes == 0:
            after, reason = restored(seen.layout, seen.load_LE, seen.fleet, seen.cold_LE), "no moves allowed"
        else:
            after = eplb_plan(seen.load_LE, seen.layout.num_experts_L, seen.fleet)
            reason = "EPLB's plan for the seen load"
        return decision_of(seen, after, reason), state


def eplb_plan(load_LE: Floats, num_experts_L: Ints, fleet: Fleet) -> Layout:
    """EPLB's global plan of all layers at once. Raises ResourceError: fewer slots than experts."""
    check_room(num_experts_L, fleet)
    num_layers, max_experts = load_LE.shape
    slots = int(fleet.slots_A.sum())
    count_LE = minimax_counts(load_LE, num_experts_L, slots, most=slots)
    # Every layer with experts has as many replicas as there are slots: [L, slots], expert by expert.
    expert_LS = np.repeat(np.tile(np.arange(max_experts), num_layers), count_LE.ravel()).reshape(num_layers, slots)
    every_L = np.arange(num_layers)
    part_LE = load_LE / np.maximum(count_LE, 1)
    heaviest_first_LS = np.argsort(-np.take_along_axis(part_LE, expert_LS, axis=1), axis=1, kind="stable")
    expert_LS = np.take_along_axis(expert_LS, heaviest_first_LS, axis=1)
    load_LA = np.zeros((num_layers, fleet.num_actors))
    free_LA = np.tile(fleet.slots_A, (num_layers, 1))
    actor_LS = np.empty_like(expert_LS)
    for step in range(slots):
        actor_L = np.where(free_LA > 0, load_LA / fleet.speed_A, np.inf).argmin(axis=1)
        actor_LS[:, step] = actor_L
        load_LA[every_L, actor_L] += part_LE[every_L, expert_LS[:, step]]
        free_LA[every_L, actor_L] -= 1
    key_LS = (every_L[:, None] * max_experts + expert_LS) * fleet.num_actors + actor_LS
    key_R, times_R = np.unique(key_LS, return_counts=True)
    expert_key_R, actor_R = np.divmod(key_R, fleet.num_actors)
    layer_R, expert_R = np.divmod(expert_key_R, max_experts)
    return make_layout(num_experts_L, layer_R, expert_R, actor_R, times_R / count_LE[layer_R, expert_R])
