"""The baseline: a reimplementation of DeepSeek's EPLB plan (github.com/deepseek-ai/EPLB, its global form).

Repeatedly give the expert with the greatest load per replica one more replica; then place the replicas, heaviest
first, each on the least loaded actor with a free slot; an expert's replicas get equal shares. The plan is recomputed at
every decision and ignores the current layout and the cost of moves.

The original requires numbers that divide evenly and equal actors; here slots may differ, and "least loaded" means least
load / speed. Where the plan puts two replicas of an expert on one actor, they become one replica of twice the share.
"""

from dataclasses import dataclass

import numpy as np

from moecluster.placement.layout import Fleet, Floats, Ints, Layout, make_layout
from moecluster.placement.plan.replica_counts import minimax_counts
from moecluster.placement.plan.restore import check_room, restored
from moecluster.placement.policy.interface import Decision, Observation, check_observation, decision_of


@dataclass(frozen=True, kw_only=True)
class EplbState:
    """No state."""


@dataclass(frozen=True, kw_only=True)
class EplbPolicy:
    """Policy `eplb`. Raises ResourceError for fewer slots than experts, ConfigError for a budget below 0.

    The published plan has no budget, so the budget is ignored, except that with a budget of 0 nothing moves.
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
    """Returns EPLB's global plan of all layers at once. Raises ResourceError for fewer slots than experts."""
    check_room(num_experts_L, fleet)
    num_layers, max_experts = load_LE.shape
    slots = int(fleet.slots_A.sum())
    count_LE = minimax_counts(load_LE, num_experts_L, slots, most=slots)
    # Every layer with experts gets as many replicas as there are slots: [L, slots], expert by expert.
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
