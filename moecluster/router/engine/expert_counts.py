"""Counts the assignments of each sequence in a batch to each expert, for all rows at once."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from moecluster.types import ExpertId

OWNERLESS = 0  # the place of rows that belong to no sequence: padding


class ExpertCounts:
    """Used by the engine's thread alone. Each sequence has a place in the counts from `enter` to `leave`."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._free: list[int] = []
        self._layers: dict[int, npt.NDArray[np.int64]] = {}  # layer -> [places, E]
        self._owners_T: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def enter(self, key: str) -> None:
        """Gives the sequence a place, if it has none."""
        if key not in self._places:
            self._places[key] = self._free.pop() if self._free else len(self._places) + 1

    def leave(self, key: str) -> dict[ExpertId, int]:
        """Returns the sequence's counts and frees its place; {} for an unknown sequence."""
        place = self._places.pop(key, None)
        if place is None:
            return {}
        self._free.append(place)
        found = {}
        for layer, counts in self._layers.items():
            if place < len(counts):
                for index in np.flatnonzero(counts[place]):
                    found[ExpertId(layer=layer, index=int(index))] = int(counts[place, index])
                counts[place] = 0
        return found

    def begin_rows(self, owners: Sequence[tuple[str, int]]) -> None:
        """Sets the rows of the next forward pass: (sequence, number of rows) in order; "" owns padding."""
        places = [self._places.get(key, OWNERLESS) for key, _ in owners]
        self._owners_T = np.repeat(np.asarray(places, dtype=np.int64), [rows for _, rows in owners])

    def owners(self, rows: Collection[int], num_rows: int) -> dict[int, str]:
        """Returns the key of the sequence of each row, without padding; {} if num_rows is not that of the batch."""
        if num_rows != len(self._owners_T):
            return {}
        keys = {place: key for key, place in self._places.items()}
        return {row: key for row in rows if (key := keys.get(int(self._owners_T[row])))}

    @property
    def owned_T(self) -> npt.NDArray[np.bool_]:
        """Which rows belong to a sequence."""
        return np.not_equal(self._owners_T, OWNERLESS)

    def add(self, layer: int, ids_TK: npt.NDArray[np.int64], num_experts: int) -> None:
        """Counts a layer's assignments; those of an index >= E are skipped."""
        if len(ids_TK) != len(self._owners_T):
            return  # not the batch's rows: the layer sees something other than tokens
        counts = self._layers.get(layer)
        places = len(self._places) + len(self._free) + 1
        if counts is None or len(counts) < places:
            grown = np.zeros((places, num_experts), dtype=np.int64)
            if counts is not None:
                grown[: len(counts)] = counts
            counts = self._layers[layer] = grown
        owners_P = np.repeat(self._owners_T, ids_TK.shape[1])
        ids_P = ids_TK.reshape(-1)
        kept = ids_P < num_experts
        counts += np.bincount(owners_P[kept] * num_experts + ids_P[kept], minlength=counts.size).reshape(counts.shape)
