"""What a replay or a simulation starts from: a fleet that nobody recorded, and experts laid out in a row."""

import numpy as np

from moecluster.placement.layout import Fleet, Floats, Ints, Layout, make_layout
from moecluster.placement.restore import check_room

BUDGET_PART = 0.02


def uniform_fleet(num_actors: int, slots: int, expert_bytes_L: Floats, *, actors_per_node: int = 1) -> Fleet:
    """Actors of equal speed and room, so many on each node."""
    return Fleet(
        slots_A=np.full(num_actors, slots, dtype=np.int64),
        speed_A=np.ones(num_actors),
        node_A=np.arange(num_actors, dtype=np.int64) // actors_per_node,
        expert_bytes_L=expert_bytes_L,
    )


def contiguous_layout(num_experts_L: Ints, fleet: Fleet) -> Layout:
    """One replica of every expert: each layer's experts in runs along the actors, as long as each one's slots.

    Raises ResourceError: fewer slots than experts.
    """
    check_room(num_experts_L, fleet)
    ends_A = np.cumsum(fleet.slots_A)
    layer_R = np.repeat(np.arange(len(num_experts_L)), num_experts_L)
    expert_R = np.concatenate([np.arange(count) for count in num_experts_L])
    slot_R = expert_R * ends_A[-1] // num_experts_L[layer_R]
    actor_R = np.searchsorted(ends_A, slot_R, side="right")
    return make_layout(num_experts_L, layer_R, expert_R, actor_R, np.ones(len(layer_R)))


def usual_budget_bytes(fleet: Fleet) -> float:
    """A budget for each decision: a fiftieth of what all slots hold, and at least what refills the roomiest actor."""
    return float(max(fleet.slots_A.max(initial=0), BUDGET_PART * fleet.slots_A.sum()) * fleet.expert_bytes_L.sum())
