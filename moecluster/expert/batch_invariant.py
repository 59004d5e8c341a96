"""The batch-invariant mode: computes rows in blocks of fixed sizes that agree for every expert of an actor.

A matrix product's rounding may depend on its number of rows. In padded blocks whose sizes were tested to agree bit for
bit, a row's result depends on that row only.
"""

from collections.abc import Callable

import torch
from torch import nn

RowFunction = Callable[[torch.Tensor], torch.Tensor]

BLOCK_ROWS = (8, 64, 512)
PROOF_SEED = 20260101
ExpertForm = tuple[object, ...]


class BlockRunner:
    """Runs row functions block by block. sizes: ascending block sizes that agree with the smallest."""

    def __init__(self, sizes: tuple[int, ...] = BLOCK_ROWS) -> None:
        self.sizes = sizes

    def __call__(self, expert: RowFunction, x_nD: torch.Tensor) -> torch.Tensor:
        """expert(x_nD), each row's result independent of the other rows."""
        outputs = []
        begin, num_rows = 0, len(x_nD)
        while begin < num_rows:
            left = num_rows - begin
            size = max((s for s in self.sizes if s <= left), default=self.sizes[0])
            block = x_nD[begin : begin + size]
            if len(block) < size:
                block = torch.cat([block, block.new_zeros(size - len(block), block.shape[1])])
            outputs.append(expert(block)[:left])
            begin += size
        return torch.cat(outputs) if len(outputs) != 1 else outputs[0]


@torch.no_grad()
def prove(expert: RowFunction, width: int, dtype: torch.dtype, sizes: tuple[int, ...] = BLOCK_ROWS) -> tuple[int, ...]:
    """The block sizes that give the same rows as the smallest size, bit for bit, on this device and for this shape."""
    generator = torch.Generator().manual_seed(PROOF_SEED)
    largest = max(sizes)
    x_nD = torch.randn(largest, width, generator=generator, dtype=torch.float32).to(dtype)
    smallest = sizes[0]
    reference = BlockRunner((smallest,))(expert, x_nD)
    return (smallest, *(s for s in sizes[1:] if torch.equal(BlockRunner((s,))(expert, x_nD), reference)))


class BlockProofs:
    """Tests each form of expert once: sizes that agree for one shape or layout may not agree for another.

    Only sizes that agree for all forms are used. Dropping a size later changes no results: every size used agrees with
    the smallest.
    """

    def __init__(self) -> None:
        self._proven: set[ExpertForm] = set()
        self._sizes: tuple[int, ...] = BLOCK_ROWS

    def add(self, module: nn.Module, width: int, dtype: torch.dtype) -> BlockRunner:
        """Tests an expert that takes rows [n, width] of the dtype; returns a runner for it and all experts added
        before."""
        form = _form(module, width, dtype)
        if form not in self._proven:
            # Against all sizes, not only those left: the smallest is the one that all actors have in common.
            agreed = prove(module, width, dtype)
            self._sizes = tuple(size for size in self._sizes if size in agreed)
            self._proven.add(form)
        return BlockRunner(self._sizes)


def _form(module: nn.Module, width: int, dtype: torch.dtype) -> ExpertForm:
    parameters = tuple((name, tuple(p.shape), p.dtype, p.is_mkldnn) for name, p in module.named_parameters())
    return (type(module), repr(module), width, dtype, parameters)
