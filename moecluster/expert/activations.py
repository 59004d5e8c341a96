"""Activations kept from a training forward until its backward, within a byte budget; beyond it they are recomputed."""

from collections import OrderedDict

from moecluster.expert.compute import Activations
from moecluster.types import MicroBatchTag, StepTag

Key = tuple[MicroBatchTag, int]  # micro-batch and layer


class KeptActivations:
    """Drops the oldest entries when the budget is reached. Used under its owner's lock."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[Key, Activations] = OrderedDict()
        self.size_bytes = 0

    def keep(self, key: Key, activations: Activations) -> None:
        """Keeps an entry, dropping the oldest until it fits; an entry larger than the whole budget is not kept."""
        self.take(key)
        if activations.size_bytes > self._budget_bytes:
            return
        while self.size_bytes + activations.size_bytes > self._budget_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.size_bytes -= oldest.size_bytes
        self._kept[key] = activations
        self.size_bytes += activations.size_bytes

    def take(self, key: Key) -> Activations | None:
        """Removes and returns the entry; None if it was dropped."""
        activations = self._kept.pop(key, None)
        if activations is not None:
            self.size_bytes -= activations.size_bytes
        return activations

    def forget(self, up_to: StepTag | None = None) -> None:
        """Drops the entries of an attempt and of older ones; all entries if up_to is None."""
        for key in [k for k in self._kept if up_to is None or k[0].step <= up_to]:
            self.take(key)
