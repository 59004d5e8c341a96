"""How evenly a placement spreads a load: the one definition of balancedness, wherever it is shown or planned by.

A layer's balancedness is the load per unit of speed that its actors carry on average, over that of the worst actor;
with equal speeds, mean load / max load. It lies in [0, 1], and 1 is perfect. An actor counts if it has slots, or if it
carries load of the layer though it has none any more (it is being drained). A layer that carries no load has none.
"""

from collections.abc import Mapping

import numpy as np

from moecluster.placement.layout import Bools, Fleet, Floats, Layout, carried_LA
from moecluster.types import ExpertId, Placement


def balancedness_of_loads_L(load_LA: Floats, speed_A: Floats, has_room_A: Bools) -> Floats:
    """Balancedness [L] of what each actor carries; NaN for layers without load. Loads and speeds are not negative.

    An actor of speed 0 that carries load never ends with it: 0.
    """
    counts_LA = has_room_A | (load_LA > 0)
    total_L = load_LA.sum(axis=1)
    speed_L = (counts_LA * speed_A).sum(axis=1)
    stuck_L = ((load_LA > 0) & (speed_A <= 0)).any(axis=1)
    worst_L = np.divide(load_LA, speed_A, out=np.zeros_like(load_LA), where=speed_A > 0).max(axis=1, initial=0.0)
    even_L = np.divide(total_L, speed_L, out=np.zeros_like(total_L), where=speed_L > 0)
    of_L = np.divide(even_L, worst_L, out=np.full_like(total_L, np.nan), where=worst_L > 0)
    of_L[stuck_L] = 0.0
    balancedness: Floats = np.minimum(of_L, 1.0)  # rounding may lead beyond; NaN stays
    return balancedness


def balancedness_L(layout: Layout, load_LE: Floats, fleet: Fleet) -> Floats:
    """Balancedness [L] of a layout under a load, of the experts that stand somewhere; NaN for layers without load."""
    return balancedness_of_loads_L(
        carried_LA(layout, load_LE, fleet.num_actors), fleet.speed_A.astype(np.float64), fleet.slots_A > 0
    )


def mean_balancedness(layout: Layout, load_LE: Floats, fleet: Fleet) -> float | None:
    """Mean over the layers that carry load; None if none does: there is nothing to judge."""
    of_L = balancedness_L(layout, load_LE, fleet)
    judged = of_L[~np.isnan(of_L)]
    return float(judged.mean()) if len(judged) else None


def layer_balancedness(placement: Placement, tokens: Mapping[ExpertId, int]) -> dict[int, float]:
    """Layer -> balancedness over all actors, at equal speeds. Layers that got no token are left out.

    tokens: assignments per expert.
    """
    actors = {actor: position for position, actor in enumerate(placement.actors)}
    layers = {layer: position for position, layer in enumerate(sorted({r.expert.layer for r in placement.replicas}))}
    load_LA = np.zeros((len(layers), len(actors)))
    for replica in placement.replicas:
        load_LA[layers[replica.expert.layer], actors[replica.actor]] += tokens.get(replica.expert, 0) * replica.share
    of_L = balancedness_of_loads_L(load_LA, np.ones(len(actors)), np.ones(len(actors), dtype=np.bool_))
    return {layer: float(of_L[position]) for layer, position in layers.items() if not np.isnan(of_L[position])}
