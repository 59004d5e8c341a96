"""Which block sizes of the batch-invariant mode hold for every expert of an actor."""

import torch
from torch import nn

from moecluster.experts.blocks import BLOCK_ROWS, BlockRunner, prove

Form = tuple[object, ...]


class BlockProofs:
    """Proves each form of expert once: sizes that agree for one shape or layout may not agree for another.

    Only sizes that hold for all are used. Fewer of them later change no bit of what the others gave before: all agree
    with the smallest.
    """

    def __init__(self) -> None:
        self._proven: set[Form] = set()
        self._sizes: tuple[int, ...] = BLOCK_ROWS

    def add(self, module: nn.Module, width: int, dtype: torch.dtype) -> BlockRunner:
        """Proves an expert that takes rows [n, width] of the dtype; returns what runs it and all before it."""
        form = _form(module, width, dtype)
        if form not in self._proven:
            # On its own sizes, not on those left: the smallest is the one that all actors have in common.
            agreed = prove(module, width, dtype)
            self._sizes = tuple(size for size in self._sizes if size in agreed)
            self._proven.add(form)
        return BlockRunner(self._sizes)


def _form(module: nn.Module, width: int, dtype: torch.dtype) -> Form:
    parameters = tuple((name, tuple(p.shape), p.dtype, p.is_mkldnn) for name, p in module.named_parameters())
    return (type(module), repr(module), width, dtype, parameters)
