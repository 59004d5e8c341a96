"""A layout from scratch: as even as the slots allow, with spare slots used as headroom and against node failures.

Replicas of similar load are packed heaviest first, which spreads hot experts widely and so stays even when loads
change. A layer that stays uneven even under the best shares, as with few slots or uneven speeds, is filled to exactly
the fair load of every actor instead; slots left over go to further replicas.

Cost: near linear in slots times layers.
"""

import numpy as np

from moecluster.placement.layout import (
    Fleet,
    Floats,
    Ints,
    Layout,
    actor_load_LA,
    make_layout,
    with_layers,
    with_shares,
)
from moecluster.placement.plan.packing import exact_fill, packed
from moecluster.placement.plan.replica_counts import least_worst_load_L
from moecluster.placement.plan.restore import check_room
from moecluster.placement.plan.shares import least_max_shares
from moecluster.placement.plan.spares import with_spare_slots_used, with_spares_moved

GOOD_ENOUGH = 0.002  # above the lower bound of the greatest load, relatively
SPARE_ROUNDS = 8  # after which spare replicas stay, even if some are needed more elsewhere


def cold_plan(load_LE: Floats, num_experts_L: Ints, fleet: Fleet) -> Layout:
    """Returns a layout for this load on an empty fleet. Raises ResourceError for fewer slots than experts."""
    check_room(num_experts_L, fleet)
    layout = packed(load_LE, num_experts_L, fleet)
    layout = with_shares(layout, least_max_shares(layout, load_LE, fleet).share_R)
    worst_L = actor_load_LA(layout, load_LE, fleet).max(axis=1)
    uneven = np.flatnonzero(worst_L > (1 + GOOD_ENOUGH) * least_worst_load_L(load_LE, num_experts_L, fleet))
    layout = _filled_where_better(layout, uneven, load_LE, fleet)
    for _ in range(SPARE_ROUNDS):
        before, layout = layout, with_spares_moved(layout, load_LE, fleet, np.inf, most_a_layer=2)
        if layout is before:
            break
    return layout


def _filled_where_better(layout: Layout, layers: Ints, load_LE: Floats, fleet: Fleet) -> Layout:
    """Returns the layout with those layers filled exactly, where that is possible."""
    filled = [_filled(load_LE[layer, : layout.num_experts_L[layer]], fleet) for layer in layers]
    layers = layers[[rows is not None for rows in filled]]
    if len(layers) == 0:
        return layout
    placed = [rows for rows in filled if rows is not None]
    layer_R = np.repeat(np.arange(len(placed)), [len(rows) for rows in placed])
    expert_R, actor_R, load_R = np.array([row for rows in placed for row in rows]).T
    part = make_layout(
        layout.num_experts_L[layers], layer_R, expert_R.astype(np.int64), actor_R.astype(np.int64), load_R
    )
    of_part = load_LE[layers, : part.max_experts]
    part = with_spare_slots_used(part, of_part, fleet)
    return with_layers(layout, layers, with_shares(part, least_max_shares(part, of_part, fleet).share_R))


def _filled(load_E: Floats, fleet: Fleet) -> list[tuple[int, int, float]] | None:
    """Returns (expert, actor, load) of each replica of an exact fill of one layer, or None if there is none."""
    speed_A = np.where(fleet.slots_A > 0, fleet.speed_A, 0.0)
    fair_A = load_E.sum() * speed_A / speed_A.sum()
    for slots_A in _thriftiest_first(len(load_E), fleet.slots_A):
        filled = exact_fill(load_E, fair_A, slots_A, fleet.node_A)
        if filled is not None:
            return filled
    return None


def _thriftiest_first(num_experts: int, slots_A: Ints) -> list[Ints]:
    """Returns slots_A less slots kept per actor for spare replicas: from the most that the fill allows, down to 0."""
    used = slots_A[slots_A > 0]
    most = max(int(used.sum()) - num_experts - len(used) + 1, 0) // len(used)
    return [np.minimum(np.maximum(slots_A - kept, 1), slots_A) for kept in range(most, -1, -1)]
