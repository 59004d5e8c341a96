"""Experts that the same tokens visit, on the same actor where it costs no balance: a token travels once to an actor,
however many of its experts live there, so every such pair saves a message."""

import numpy as np

from moecluster.placement.layout import Fleet, Floats, Ints, Layout, make_layout
from moecluster.placement.plan.shares import least_max_shares

NEIGHBOURS = 16  # of the experts sorted by load, so many on either side may be exchanged for one
MOST_LOAD_APART = 0.1  # of an actor's fair load
MOST_LOSS = 0.001  # of the worst actor's load, that a layer may pay for its messages


def pairs_together_L(layout: Layout, coactivation_LEE: Floats) -> Floats:
    """Pairs of visits per second that meet on one actor, [L]: about as many messages less than visits.

    coactivation_LEE: tokens per second that visit both experts. Replicas are chosen independently, by share.
    """
    together_L = np.empty(layout.num_layers)
    for layer in range(layout.num_layers):
        share_EA = _share_EA(layout, layer)
        pairs_EE = _pairs_EE(coactivation_LEE[layer])
        together_L[layer] = (share_EA * (pairs_EE @ share_EA)).sum() / 2
    return together_L


def gathered(layout: Layout, load_LE: Floats, fleet: Fleet, coactivation_LEE: Floats) -> Layout:
    """The layout after exchanges of undivided experts of like load that bring more pairs together; shares solved anew.

    At most E exchanges a layer, the best first. A layer that would lose balance stays as it was.
    """
    actor_R = layout.actor_R.copy()
    for layer in range(layout.num_layers):
        mine = np.flatnonzero(layout.layer_R == layer)
        fair = load_LE[layer].sum() / max(int((fleet.slots_A > 0).sum()), 1)
        pairs_EE = _pairs_EE(coactivation_LEE[layer])
        actor_R[mine] = _exchanged(layout, layer, load_LE[layer], MOST_LOAD_APART * fair, pairs_EE)
    moved = make_layout(layout.num_experts_L, layout.layer_R, layout.expert_R, actor_R, layout.share_R)
    before = least_max_shares(layout, load_LE, fleet)
    after = least_max_shares(moved, load_LE, fleet)
    worse_L = after.load_LA.max(axis=1) > before.load_LA.max(axis=1) * (1 + MOST_LOSS)
    back_R = worse_L[layout.layer_R]  # both are sorted by (layer, expert), and a layer keeps its number of replicas
    return make_layout(
        layout.num_experts_L,
        layout.layer_R,
        layout.expert_R,
        np.where(back_R, layout.actor_R, moved.actor_R),
        np.where(back_R, before.share_R, after.share_R),
    )


def _exchanged(layout: Layout, layer: int, load_E: Floats, most_apart: float, pairs_EE: Floats) -> Ints:
    """The actors of the layer's replicas, in the layout's order, after the exchanges."""
    mine_R = layout.layer_R == layer
    expert_R, actor_R = layout.expert_R[mine_R], layout.actor_R[mine_R].copy()
    share_EA = _share_EA(layout, layer)
    drawn_EA = pairs_EE @ share_EA  # pairs that an expert would have on each actor
    count_E = np.bincount(expert_R, minlength=len(load_E))
    actor_E = np.zeros(len(load_E), dtype=np.int64)
    actor_E[expert_R] = actor_R
    one, other = _alike(np.flatnonzero(count_E == 1), load_E, most_apart)
    for _ in range(len(load_E)):
        here, there = actor_E[one], actor_E[other]
        gain = drawn_EA[one, there] + drawn_EA[other, here] - drawn_EA[one, here] - drawn_EA[other, there]
        gain = np.where(here == there, 0.0, gain - 2 * pairs_EE[one, other])
        best = int(gain.argmax()) if len(gain) else -1
        if best < 0 or gain[best] <= 1e-9 * pairs_EE.sum():
            break
        e, f, a, b = one[best], other[best], here[best], there[best]
        actor_E[e], actor_E[f] = b, a
        shift_E = pairs_EE[:, f] - pairs_EE[:, e]
        drawn_EA[:, a] += shift_E
        drawn_EA[:, b] -= shift_E
    single_R = count_E[expert_R] == 1
    actor_R[single_R] = actor_E[expert_R[single_R]]
    exchanged_R: Ints = actor_R
    return exchanged_R


def _alike(expert_X: Ints, load_E: Floats, most_apart: float) -> tuple[Ints, Ints]:
    """Pairs of experts that lie near each other in the order of their loads."""
    sorted_X = expert_X[np.argsort(load_E[expert_X], kind="stable")]
    one = np.concatenate([sorted_X[:-step] for step in range(1, NEIGHBOURS + 1)])
    other = np.concatenate([sorted_X[step:] for step in range(1, NEIGHBOURS + 1)])
    near = load_E[other] - load_E[one] <= most_apart
    return one[near], other[near]


def _share_EA(layout: Layout, layer: int) -> Floats:
    mine_R = layout.layer_R == layer
    share_EA = np.zeros((layout.max_experts, int(layout.actor_R.max(initial=0)) + 1))
    share_EA[layout.expert_R[mine_R], layout.actor_R[mine_R]] = layout.share_R[mine_R]
    return share_EA


def _pairs_EE(coactivation_EE: Floats) -> Floats:
    pairs_EE = coactivation_EE.copy()
    np.fill_diagonal(pairs_EE, 0.0)
    return pairs_EE
