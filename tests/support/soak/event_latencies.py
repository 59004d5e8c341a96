"""Latencies of the next token during cluster events."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tests.support.soak.cluster_events import ClusterEvent

UNDISTURBED = "nothing"


@dataclass(frozen=True, kw_only=True)
class EventLatencies:
    """Waits for the next token that overlap events of one kind; in seconds."""

    kind: str
    events: int
    tokens: int
    p50_s: float
    p99_s: float
    max_s: float


def event_latencies(chunks_s: Iterable[Sequence[float]], happened: Sequence[ClusterEvent]) -> list[EventLatencies]:
    """Returns one row per kind, first that of waits during no event. A wait counts for every kind it overlaps.

    chunks_s: for each request, when each chunk arrived. The wait for the first chunk is left out: it includes the
    prompt's computation.
    """
    waits = [pair for of_text_s in chunks_s for pair in pairwise(of_text_s)]
    begun_W, ended_W = np.array(waits).T
    calm_W = np.ones(len(waits), dtype=np.bool_)
    by_kind: dict[str, list[ClusterEvent]] = {}
    for event in happened:
        by_kind.setdefault(event.kind, []).append(event)
    rows = []
    for kind, of_kind in sorted(by_kind.items()):
        met_W = np.zeros(len(waits), dtype=np.bool_)
        for event in of_kind:
            met_W |= (begun_W < event.ended_s) & (ended_W > event.begun_s)
        calm_W &= ~met_W
        if met_W.any():
            rows.append(_row(kind, len(of_kind), (ended_W - begun_W)[met_W]))
    calm = [_row(UNDISTURBED, 0, (ended_W - begun_W)[calm_W])] if calm_W.any() else []
    return calm + rows


def _row(kind: str, events: int, waits_s: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> EventLatencies:
    p50_s, p99_s = np.percentile(waits_s, (50, 99)).tolist()
    return EventLatencies(
        kind=kind, events=events, tokens=len(waits_s), p50_s=p50_s, p99_s=p99_s, max_s=float(waits_s.max())
    )
