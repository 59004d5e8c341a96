"""When the replicas of a new layout are there: copies over links that carry one in and one out at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moecluster.placement.layout import Fleet, Layout, added_R

STORE = -1  # the source of an expert that no actor holds: its checkpoint, which many can read at a time


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One expert on its way."""

    layer: int  # position
    source: int  # actor, or STORE
    target: int
    start_s: float
    end_s: float


def schedule(before: Layout, after: Layout, fleet: Fleet, now_s: float, bytes_per_s: float) -> list[Transfer]:
    """Greedy list schedule of the copies that lead from one layout to another; all links are free at now_s.

    Lost experts come first, then layer by layer. Each copy comes from the holder whose link is free first.
    """
    wanted_R = added_R(before, after)
    key_N, layer_N, target_N = after.expert_key_R[wanted_R], after.layer_R[wanted_R], after.actor_R[wanted_R]
    first_N = np.searchsorted(before.expert_key_R, key_N, side="left")
    end_N = np.searchsorted(before.expert_key_R, key_N, side="right")
    order = np.lexsort((layer_N, end_N > first_N)).tolist()
    first, end, layer, target = first_N.tolist(), end_N.tolist(), layer_N.tolist(), target_N.tolist()
    holders = before.actor_R.tolist()
    seconds_L = (fleet.expert_bytes_L / bytes_per_s).tolist()
    out_free_s, in_free_s = [now_s] * fleet.num_actors, [now_s] * fleet.num_actors
    transfers = []
    for n in order:
        source = _first_free(holders[first[n] : end[n]], out_free_s)
        begins_s = max(in_free_s[target[n]], out_free_s[source] if source != STORE else now_s)
        ends_s = begins_s + seconds_L[layer[n]]
        in_free_s[target[n]] = ends_s
        if source != STORE:
            out_free_s[source] = ends_s
        transfers.append(Transfer(layer=layer[n], source=source, target=target[n], start_s=begins_s, end_s=ends_s))
    return transfers


def _first_free(holders: Sequence[int], free_s: Sequence[float]) -> int:
    return min(holders, key=free_s.__getitem__, default=STORE)
