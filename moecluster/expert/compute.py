"""How an expert actor computes batches: forward passes merged over batches, training passes one batch at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from moecluster.types import ComputeBatch, ComputeResult

RunExpert = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def run_plainly(expert: nn.Module, x_nD: torch.Tensor) -> torch.Tensor:
    """Runs all rows in one call."""
    y_nD: torch.Tensor = expert(x_nD)
    return y_nD


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One expert's pairs in one batch."""

    batch: int
    pairs: slice
    rows_n: torch.Tensor | None  # None: every row of the batch, in order

    def of(self, x_ND: torch.Tensor) -> torch.Tensor:
        return x_ND if self.rows_n is None else x_ND.index_select(0, self.rows_n)


def _is_every_row(rows_n: npt.NDArray[np.int32], num_rows: int) -> bool:
    """Whether rows_n is 0..N-1. Rows ascend, with a duplicate if a token chose the expert twice."""
    return len(rows_n) == num_rows and (num_rows == 1 or bool((rows_n[1:] > rows_n[:-1]).all()))


def _pieces(batches: Sequence[ComputeBatch]) -> dict[int, list[_Piece]]:
    """Expert -> its pieces, in the order of the batches."""
    by_expert: dict[int, list[_Piece]] = {}
    for b, batch in enumerate(batches):
        begin, num_rows, rows_P = 0, len(batch.x_ND), batch.pair_rows_P.numpy()
        for expert, count in zip(batch.experts, batch.pair_counts, strict=True):
            pairs = slice(begin, begin + count)
            whole = _is_every_row(rows_P[pairs], num_rows)
            piece = _Piece(batch=b, pairs=pairs, rows_n=None if whole else batch.pair_rows_P[pairs])
            by_expert.setdefault(expert, []).append(piece)
            begin += count
    return by_expert


@torch.inference_mode()
def forward(
    experts: Mapping[int, nn.Module], batches: Sequence[ComputeBatch], run: RunExpert = run_plainly
) -> list[ComputeResult]:
    """Computes batches of one layer, dtype and kind of reply; each expert runs once over the rows of all batches.

    Sums are kept in float32 and returned in the rows' dtype.
    """
    unsummed = batches[0].unsummed
    sums: list[torch.Tensor | None] = [None] * len(batches)
    pairs: list[list[torch.Tensor]] = [[] for _ in batches]
    for expert, pieces in sorted(_pieces(batches).items()):
        inputs = [piece.of(batches[piece.batch].x_ND) for piece in pieces]
        y_nD = run(experts[expert], inputs[0] if len(inputs) == 1 else torch.cat(inputs))
        begin = 0
        for piece, rows in zip(pieces, inputs, strict=True):
            part_nD = y_nD[begin : begin + len(rows)]
            begin += len(rows)
            if unsummed:
                pairs[piece.batch].append(part_nD)
            else:
                sums[piece.batch] = _add(sums[piece.batch], part_nD, piece, batches[piece.batch])
    if unsummed:
        return [
            ComputeResult(request_id=b.request_id, y_PD=torch.cat(p).to(b.x_ND.dtype))
            for b, p in zip(batches, pairs, strict=True)
        ]
    return [
        ComputeResult(request_id=b.request_id, y_ND=_summed(s).to(b.x_ND.dtype))
        for b, s in zip(batches, sums, strict=True)
    ]


def _summed(total_ND: torch.Tensor | None) -> torch.Tensor:
    assert total_ND is not None, "every batch has at least one pair"
    return total_ND


def _add(total_ND: torch.Tensor | None, part_nD: torch.Tensor, piece: _Piece, batch: ComputeBatch) -> torch.Tensor:
    """The batch's running sum with one expert's weighted rows added."""
    weighted_nD = part_nD * batch.pair_weights_P[piece.pairs, None]  # float32, whatever the rows are
    if piece.rows_n is None:
        return weighted_nD if total_ND is None else total_ND.add_(weighted_nD)
    if total_ND is None:
        total_ND = torch.zeros(batch.x_ND.shape, dtype=weighted_nD.dtype)
    return total_ND.index_add_(0, piece.rows_n, weighted_nD)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The graph of one training forward, from its leaves to its sums."""

    x_ND: torch.Tensor
    weights_P: torch.Tensor
    y_ND: torch.Tensor
    size_bytes: int  # of the tensors that the graph holds, without parameters


def train_forward(
    experts: Mapping[int, nn.Module], batch: ComputeBatch, run: RunExpert = run_plainly
) -> tuple[ComputeResult, Activations]:
    """The result of one batch, and the graph that its backward needs."""
    # The rows may lie in the sender's shared memory, which is reused after the reply: the graph needs a copy.
    x_ND = batch.x_ND.detach().clone().requires_grad_()
    weights_P = batch.pair_weights_P.detach().clone().requires_grad_()
    # Autograd may save a parameter as a view (a transposed weight), so parameters are recognized by their storage.
    seen = {p.untyped_storage().data_ptr() for expert in batch.experts for p in experts[expert].parameters()}
    size_bytes = 0

    def count(saved: torch.Tensor) -> torch.Tensor:
        nonlocal size_bytes
        storage = saved.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            size_bytes += storage.nbytes()
        return saved

    outputs = []
    begin = 0
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        y_ND = torch.zeros(x_ND.shape, dtype=torch.float32)
        for expert, num_pairs in zip(batch.experts, batch.pair_counts, strict=True):
            pairs = slice(begin, begin + num_pairs)
            begin += num_pairs
            rows_n = batch.pair_rows_P[pairs]
            whole = _is_every_row(rows_n.numpy(), len(x_ND))
            out_nD = run(experts[expert], x_ND if whole else x_ND.index_select(0, rows_n))
            weighted_nD = out_nD * weights_P[pairs, None]
            y_ND = y_ND + weighted_nD if whole else y_ND.index_add(0, rows_n, weighted_nD)
            outputs.append(out_nD.detach())
        y_ND = y_ND.to(x_ND.dtype)
    activations = Activations(x_ND=x_ND, weights_P=weights_P, y_ND=y_ND, size_bytes=size_bytes)
    if batch.unsummed:
        return ComputeResult(request_id=batch.request_id, y_PD=torch.cat(outputs)), activations
    return ComputeResult(request_id=batch.request_id, y_ND=y_ND.detach()), activations


ExpertGradients = dict[int, dict[str, torch.Tensor]]  # expert index -> parameter name -> gradient


def backward(
    experts: Mapping[int, nn.Module], batch: ComputeBatch, activations: Activations
) -> tuple[ComputeResult, ExpertGradients]:
    """Gradients of the batch's rows and gate weights, and of the parameters of each expert that computed them."""
    assert batch.grad_ND is not None
    named = [
        (expert, name, parameter)
        for expert in batch.experts
        for name, parameter in experts[expert].named_parameters()
        if parameter.requires_grad
    ]
    grads = torch.autograd.grad(
        activations.y_ND,
        [activations.x_ND, activations.weights_P, *(parameter for _, _, parameter in named)],
        batch.grad_ND,
        allow_unused=True,
    )
    by_expert: ExpertGradients = {}
    for (expert, name, _), grad in zip(named, grads[2:], strict=True):
        if grad is not None:
            by_expert.setdefault(expert, {})[name] = grad
    grad_x_ND, grad_w_P = grads[0], grads[1]
    if grad_x_ND is None:  # the experts do not propagate gradients to their input
        grad_x_ND = torch.zeros_like(activations.x_ND)
    result = ComputeResult(request_id=batch.request_id, grad_x_ND=grad_x_ND, grad_w_P=grad_w_P)
    return result, by_expert
