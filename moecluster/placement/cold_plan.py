"""A layout from nothing: as even as the slots allow, with slots to spare spent on what may change and what may fail.

Where the wrap-around fill comes out even, every actor has its fair load to the last token; elsewhere replicas by
least-worst counts are packed heaviest first, and the shares, then single moves, even them out. Slots that neither needs
go to further replicas: of the hottest experts (so that shares can follow the load), then of experts that stand on one node
only (so that the loss of a node leaves them), then of the hottest again.

Cost: near linear in slots times layers.
"""

import numpy as np

from moecluster.placement.coactivation import gathered
from moecluster.placement.exact_fill import exact_fill
from moecluster.placement.layout import Fleet, Floats, Ints, Layout, make_layout, with_shares
from moecluster.placement.packing import packed
from moecluster.placement.restore import check_room
from moecluster.placement.shares import least_max_shares
from moecluster.placement.spare_slots import with_spare_slots_used


def cold_plan(load_LE: Floats, num_experts_L: Ints, fleet: Fleet, coactivation_LEE: Floats | None = None) -> Layout:
    """A layout for this load on an empty fleet. Raises ResourceError: fewer slots than experts."""
    check_room(num_experts_L, fleet)
    planned = [_plan_layer(load_LE[layer, :count], fleet) for layer, count in enumerate(num_experts_L)]
    layer_R = np.repeat(np.arange(len(planned)), [len(rows) for rows in planned])
    expert_R, actor_R, load_R = np.array([row for rows in planned for row in rows]).reshape(-1, 3).T
    placed = make_layout(num_experts_L, layer_R, expert_R.astype(np.int64), actor_R.astype(np.int64), load_R)
    layout = with_spare_slots_used(placed, load_LE, fleet)
    layout = with_shares(layout, least_max_shares(layout, load_LE, fleet).share_R)
    if coactivation_LEE is not None:
        layout = gathered(layout, load_LE, fleet, coactivation_LEE)
    return layout


def _plan_layer(load_E: Floats, fleet: Fleet) -> list[tuple[int, int, float]]:
    """(expert, actor, load) of each replica that one layer needs."""
    speed_A = np.where(fleet.slots_A > 0, fleet.speed_A, 0.0)
    fair_A = load_E.sum() * speed_A / speed_A.sum()
    for slots_A in _thriftiest_first(len(load_E), fleet.slots_A):
        filled = exact_fill(load_E, fair_A, slots_A, fleet.node_A)
        if filled is not None:
            return filled
    return packed(load_E, fleet)


def _thriftiest_first(num_experts: int, slots_A: Ints) -> list[Ints]:
    """The slots less those of each actor that can be kept for spare replicas: as many as the fill allows, down to none."""
    used = slots_A[slots_A > 0]
    most = max(int(used.sum()) - num_experts - len(used) + 1, 0) // len(used)
    return [np.minimum(np.maximum(slots_A - kept, 1), slots_A) for kept in range(most, -1, -1)]
