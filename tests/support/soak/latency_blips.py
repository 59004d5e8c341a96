"""How long users waited for their next token while something happened to the cluster."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tests.support.soak.happenings import Happening

UNDISTURBED = "nothing"


@dataclass(frozen=True, kw_only=True)
class Blips:
    """Waits for a next token that fell, in part at least, into happenings of one kind; in seconds."""

    kind: str
    happenings: int
    tokens: int
    p50_s: float
    p99_s: float
    max_s: float


def blips(pieces_s: Iterable[Sequence[float]], happened: Sequence[Happening]) -> list[Blips]:
    """One row a kind, that during nothing first. A wait during several happenings counts for each of their kinds.

    pieces_s: when each piece of a text came, text by text. The wait for a text's first one is left out: it takes the
    prompt's time.
    """
    waits = [pair for of_text_s in pieces_s for pair in pairwise(of_text_s)]
    begun_W, ended_W = np.array(waits).T
    calm_W = np.ones(len(waits), dtype=np.bool_)
    by_kind: dict[str, list[Happening]] = {}
    for happening in happened:
        by_kind.setdefault(happening.kind, []).append(happening)
    rows = []
    for kind, of_kind in sorted(by_kind.items()):
        met_W = np.zeros(len(waits), dtype=np.bool_)
        for happening in of_kind:
            met_W |= (begun_W < happening.ended_s) & (ended_W > happening.begun_s)
        calm_W &= ~met_W
        if met_W.any():
            rows.append(_row(kind, len(of_kind), (ended_W - begun_W)[met_W]))
    calm = [_row(UNDISTURBED, 0, (ended_W - begun_W)[calm_W])] if calm_W.any() else []
    return calm + rows


def _row(kind: str, happenings: int, waits_s: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> Blips:
    p50_s, p99_s = np.percentile(waits_s, (50, 99)).tolist()
    return Blips(
        kind=kind, happenings=happenings, tokens=len(waits_s), p50_s=p50_s, p99_s=p99_s, max_s=float(waits_s.max())
    )
