"""Layouts for replays and simulations: initial ones, and those between two plans."""

import numpy as np

from moecluster.placement.layout import Bools, Fleet, Floats, Ints, Layout, make_layout, with_shares, without
from moecluster.placement.plan.restore import check_room

BUDGET_PART = 0.02


def layers_taken(before: Layout, after: Layout, layers_L: Bools) -> Layout:
    """Returns `before` with some layers replaced by those of `after`."""
    kept_R, taken_R = ~layers_L[before.layer_R], layers_L[after.layer_R]
    layer_R = np.concatenate([before.layer_R[kept_R], after.layer_R[taken_R]])
    order = np.argsort(layer_R, kind="stable")  # both parts are sorted within their layers
    return Layout(
        num_experts_L=before.num_experts_L,
        layer_R=layer_R[order],
        expert_R=np.concatenate([before.expert_R[kept_R], after.expert_R[taken_R]])[order],
        actor_R=np.concatenate([before.actor_R[kept_R], after.actor_R[taken_R]])[order],
        share_R=np.concatenate([before.share_R[kept_R], after.share_R[taken_R]])[order],
    )


def surviving(layout: Layout, gone_A: Bools) -> Layout:
    """Returns the layout without the gone actors: an expert's remaining replicas take over their shares."""
    left = without(layout, gone_A[layout.actor_R])
    return with_shares(left, left.scaled_share_R)


def hosted_experts_LE(layout: Layout) -> Bools:
    """Returns which experts have a replica: [L, E]."""
    hosted_X = np.zeros(layout.num_layers * layout.max_experts, dtype=np.bool_)
    hosted_X[layout.expert_key_R] = True
    return hosted_X.reshape(layout.num_layers, layout.max_experts)


def uniform_fleet(num_actors: int, slots: int, expert_bytes_L: Floats, *, actors_per_node: int = 1) -> Fleet:
    """Returns a fleet of actors of equal speed and slots, actors_per_node on each node."""
    return Fleet(
        slots_A=np.full(num_actors, slots, dtype=np.int64),
        speed_A=np.ones(num_actors),
        node_A=np.arange(num_actors, dtype=np.int64) // actors_per_node,
        expert_bytes_L=expert_bytes_L,
    )


def contiguous_layout(num_experts_L: Ints, fleet: Fleet) -> Layout:
    """Returns one replica of every expert: each layer's experts in runs along the actors, in proportion to their slots.

    Raises ResourceError for fewer slots than experts.
    """
    check_room(num_experts_L, fleet)
    ends_A = np.cumsum(fleet.slots_A)
    layer_R = np.repeat(np.arange(len(num_experts_L)), num_experts_L)
    expert_R = np.concatenate([np.arange(count) for count in num_experts_L])
    slot_R = expert_R * ends_A[-1] // num_experts_L[layer_R]
    actor_R = np.searchsorted(ends_A, slot_R, side="right")
    return make_layout(num_experts_L, layer_R, expert_R, actor_R, np.ones(len(layer_R)))


def usual_budget_bytes(fleet: Fleet) -> float:
    """Returns a budget per decision: 2 % of what all slots hold, and at least the content of the largest actor."""
    return float(max(fleet.slots_A.max(initial=0), BUDGET_PART * fleet.slots_A.sum()) * fleet.expert_bytes_L.sum())
