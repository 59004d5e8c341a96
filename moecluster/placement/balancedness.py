"""How evenly a placement spreads a load."""

from collections.abc import Mapping

from moecluster.types import ExpertId, Placement


def layer_balancedness(placement: Placement, tokens: Mapping[ExpertId, int]) -> dict[int, float]:
    """Layer -> mean actor load / max actor load; 1 is perfect. Layers that got no token are left out.

    tokens: assignments per expert. An actor's load is the sum over its replicas of the expert's tokens times the share;
    actors without experts of a layer count as idle ones.
    """
    load_of: dict[int, dict[str, float]] = {}
    for replica in placement.replicas:
        loads = load_of.setdefault(replica.expert.layer, dict.fromkeys(placement.actors, 0.0))
        loads[replica.actor] += tokens.get(replica.expert, 0) * replica.share
    return {
        layer: sum(loads.values()) / len(loads) / max(loads.values())
        for layer, loads in sorted(load_of.items())
        if max(loads.values()) > 0
    }
