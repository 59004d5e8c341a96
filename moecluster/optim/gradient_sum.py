"""Sums the gradients of one attempt in a fixed order, independent of the order of arrival."""

from collections.abc import Collection, Mapping

import torch

from moecluster.errors import AttemptAborted, InvalidMessage
from moecluster.types import MessageKey

ModuleGradients = Mapping[str, Mapping[str, torch.Tensor]]  # module -> parameter -> gradient


def _order(key: MessageKey) -> tuple[int, int, int, int]:
    """Sort key: by micro-batch, then by rank."""
    return (key.micro_batch, key.rank, key.layer, key.pass_index)


class GradientFold:
    """A running sum of gradients. It adds a message once no earlier one can still arrive, and buffers it until then.

    A rank sends its micro-batches in order, so its first message of a later micro-batch shows that the earlier ones
    are complete. With one rank and one micro-batch nothing is copied or added.
    """

    def __init__(self, ranks: int = 1) -> None:
        self.keys: set[MessageKey] = set()
        self._aside: dict[MessageKey, ModuleGradients] = {}
        self._sums: dict[str, dict[str, torch.Tensor]] = {}
        self._micro_batches = [0] * ranks  # the latest micro-batch received from each rank

    def add(self, key: MessageKey, grads: ModuleGradients) -> None:
        """Takes ownership of the gradients: the caller must not write to them again. The key must be new.

        Raises InvalidMessage for an unknown rank, AttemptAborted if the rank has already sent a later micro-batch.
        """
        assert key not in self.keys
        if not 0 <= key.rank < len(self._micro_batches):
            raise InvalidMessage("rank", f"got {key.rank}, expected 0 to {len(self._micro_batches) - 1}")
        if key.micro_batch < self._micro_batches[key.rank]:
            raise AttemptAborted(
                f"rank {key.rank} sent micro-batch {key.micro_batch} after {self._micro_batches[key.rank]}"
            )
        self.keys.add(key)
        self._aside[key] = grads
        self._micro_batches[key.rank] = key.micro_batch
        complete_before = min((micro_batch, rank) for rank, micro_batch in enumerate(self._micro_batches))
        self._fold([k for k in self._aside if (k.micro_batch, k.rank) < complete_before])

    def finish(self) -> dict[str, dict[str, torch.Tensor]]:
        """Returns the sums of all gradients received: module -> parameter -> gradient."""
        self._fold(self._aside.keys())
        return self._sums

    def clear(self) -> None:
        """Drops the sums but keeps the keys."""
        self._sums = {}

    def _fold(self, keys: Collection[MessageKey]) -> None:
        for key in sorted(keys, key=_order):
            for module, grads in self._aside.pop(key).items():
                sums = self._sums.setdefault(module, {})
                for name, grad in grads.items():
                    # Not in place: autograd may return views.
                    sums[name] = sums[name] + grad if name in sums else grad
