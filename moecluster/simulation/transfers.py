"""Schedules the copies that lead to a new layout, over links that carry one copy in and one out at a time."""

from dataclasses import dataclass

import numpy as np

from moecluster.placement.layout import Fleet, Layout, added_R

STORE = -1  # the source of an expert that no actor holds: the checkpoint, which many can read at a time


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One copy of an expert."""

    layer: int  # position
    source: int  # actor, or STORE
    target: int
    start_s: float
    end_s: float


def schedule(before: Layout, after: Layout, fleet: Fleet, now_s: float, bytes_per_s: float) -> list[Transfer]:
    """Returns a greedy list schedule of the copies from one layout to another; all links are free at now_s.

    Lost experts come first, then layer by layer. A copy comes from the holder that can send it first, and a copy that
    has arrived can be sent on: the copies of a hot expert double with every round.
    """
    wanted_R = added_R(before, after)
    key_N, layer_N, target_N = after.expert_key_R[wanted_R], after.layer_R[wanted_R], after.actor_R[wanted_R]
    first_N = np.searchsorted(before.expert_key_R, key_N, side="left")
    end_N = np.searchsorted(before.expert_key_R, key_N, side="right")
    order = np.lexsort((layer_N, end_N > first_N)).tolist()
    key, first, end, layer, target = (column.tolist() for column in (key_N, first_N, end_N, layer_N, target_N))
    actor_of_replica = before.actor_R.tolist()
    seconds_L = (fleet.expert_bytes_L / bytes_per_s).tolist()
    out_free_s, in_free_s = [now_s] * fleet.num_actors, [now_s] * fleet.num_actors
    holders: dict[int, dict[int, float]] = {}  # expert -> actor -> since when it has a copy
    transfers = []
    for n in order:
        held = holders.setdefault(key[n], dict.fromkeys(actor_of_replica[first[n] : end[n]], now_s))
        source, begins_s = STORE, in_free_s[target[n]]
        if end[n] > first[n]:
            ready_s, source = min((max(since_s, out_free_s[actor]), actor) for actor, since_s in held.items())
            begins_s = max(begins_s, ready_s)
        ends_s = begins_s + seconds_L[layer[n]]
        if source != STORE:
            out_free_s[source] = ends_s
        in_free_s[target[n]] = held[target[n]] = ends_s
        transfers.append(Transfer(layer=layer[n], source=source, target=target[n], start_s=begins_s, end_s=ends_s))
    return transfers
