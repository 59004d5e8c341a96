"""Dispatch and combine, inverses of each other.

dispatch() splits rows and pairs by actor; a token goes to an actor once, however many of its experts live there.
combine() adds the replies in the tokens' order. They share only the frozen DispatchPart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from moecluster.dispatch.replica_choice import LayerTable, choose_actors, content_keys
from moecluster.types import ComputeResult

ROW_WORDS = 8


@dataclass(frozen=True, kw_only=True)
class DispatchPart:
    """The part of a batch that goes to one actor.

    A pair's slot is its place t * K + k in the flattened [T, K] routing.
    """

    actor: str
    rows_N: torch.Tensor  # int64: the tokens sent, ascending
    every_row: bool  # rows_N is 0..T-1
    experts: tuple[int, ...]
    pair_counts: tuple[int, ...]
    pair_rows_P: torch.Tensor  # int32 in [0, N)
    pair_slots_P: torch.Tensor  # int64
    pair_weights_P: torch.Tensor  # float32


def kept_slots(ids_TK: torch.Tensor, num_experts: int) -> npt.NDArray[np.int64]:
    """Slots of the assignments that were not dropped (an index >= E means: skip)."""
    return np.flatnonzero(ids_TK.numpy().reshape(-1) < num_experts)


def dispatch(
    table: LayerTable,
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    slots_P: npt.NDArray[np.int64] | None = None,
) -> tuple[DispatchPart, ...]:
    """Splits a routing by the actors of a layer.

    ids_TK is int64 and weights_TK float32, all on the CPU; x_TD is read only if an expert has several replicas, to tell
    tokens apart. slots_P restricts the split to some assignments (those of a failed actor). Raises NotHosted if an
    expert has no replica.
    """
    top_k = ids_TK.shape[1]
    if slots_P is None:
        slots_P = kept_slots(ids_TK, table.num_experts)
    weights = weights_TK.numpy()
    experts_P = ids_TK.numpy().reshape(-1)[slots_P]
    tokens_P = slots_P // top_k
    keys_P = content_keys(_row_words(x_TD), weights)[tokens_P] if table.replicated else None
    actor_P = choose_actors(table, experts_P, keys_P)
    weights_P = weights.reshape(-1)[slots_P]
    # One sort for all: by actor, then expert; stable, so tokens ascend within an expert.
    place_P = actor_P * table.num_experts + experts_P
    order_P = np.argsort(place_P, kind="stable")
    place_P, tokens_P, slots_P, weights_P = place_P[order_P], tokens_P[order_P], slots_P[order_P], weights_P[order_P]
    # Where each expert's pairs begin, by actor. Lists and few NumPy calls, because with few tokens each call counts.
    begins = [0, *(np.flatnonzero(place_P[1:] != place_P[:-1]) + 1).tolist()] if len(place_P) else []
    by_actor: dict[int, list[tuple[int, int, int]]] = {}  # actor -> (expert, begin, end)
    for place, begin, end in zip(place_P[begins].tolist(), begins, [*begins[1:], len(place_P)], strict=False):
        actor, expert = divmod(place, table.num_experts)
        by_actor.setdefault(actor, []).append((expert, begin, end))
    parts = []
    for actor, groups in by_actor.items():
        part = slice(groups[0][1], groups[-1][2])
        rows_N, pair_rows_P = _rows_and_places(tokens_P[part], len(ids_TK))
        parts.append(
            DispatchPart(
                actor=table.actors[actor],
                rows_N=torch.from_numpy(rows_N),
                every_row=len(rows_N) == len(ids_TK),
                experts=tuple(expert for expert, _, _ in groups),
                pair_counts=tuple(end - begin for _, begin, end in groups),
                pair_rows_P=torch.from_numpy(pair_rows_P),
                pair_slots_P=torch.from_numpy(slots_P[part]),
                pair_weights_P=torch.from_numpy(weights_P[part]),
            )
        )
    return tuple(parts)


def _rows_and_places(
    tokens_P: npt.NDArray[np.int64], num_tokens: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """The distinct tokens, ascending, and each pair's index into them: np.unique(return_inverse=True) without a
    sort."""
    place_T = np.zeros(num_tokens, dtype=np.int32)
    place_T[tokens_P] = 1
    rows_N = np.flatnonzero(place_T)
    place_T[rows_N] = np.arange(len(rows_N), dtype=np.int32)
    return rows_N, place_T[tokens_P]


def _row_words(x_TD: torch.Tensor) -> npt.NDArray[np.float32]:
    """A few values of every row, spread evenly over its width: enough to tell rows apart at almost no cost."""
    step = max(x_TD.shape[1] // ROW_WORDS, 1)
    words_TW: npt.NDArray[np.float32] = x_TD.detach()[:, : ROW_WORDS * step : step].float().numpy()
    return words_TW


def rows_of(part: DispatchPart, x_TD: torch.Tensor) -> torch.Tensor:
    """x_ND: the rows sent to the part's actor."""
    return x_TD if part.every_row else x_TD.index_select(0, part.rows_N)


def combine(answers: Sequence[tuple[DispatchPart, ComputeResult]], like_TD: torch.Tensor) -> torch.Tensor:
    """y_TD in the dtype of like_TD: the weighted partial sums, added in float32. Tokens without a reply get zeros."""
    if len(answers) == 1 and answers[0][0].every_row:
        only = answers[0][1].y_ND
        assert only is not None
        return only.to(like_TD.dtype)
    return _scatter_rows([(part, result.y_ND) for part, result in answers], like_TD)


def combine_pairs(
    answers: Sequence[tuple[DispatchPart, ComputeResult]], weights_TK: torch.Tensor, like_TD: torch.Tensor
) -> torch.Tensor:
    """y_TD from unweighted, unsummed pairs, added in float32 in the order of k, independent of the split
    (batch-invariant)."""
    num_tokens, top_k = weights_TK.shape
    pairs_SD = torch.zeros(num_tokens * top_k, like_TD.shape[1], dtype=torch.float32)
    for part, result in answers:
        assert result.y_PD is not None
        pairs_SD[part.pair_slots_P] = result.y_PD.float()
    pairs_TKD = pairs_SD.view(num_tokens, top_k, like_TD.shape[1])
    y_TD = torch.zeros(like_TD.shape, dtype=torch.float32)
    for k in range(top_k):
        y_TD += pairs_TKD[:, k] * weights_TK[:, k, None].float()
    return y_TD.to(like_TD.dtype)


def combine_gradients(
    answers: Sequence[tuple[DispatchPart, ComputeResult]], like_TD: torch.Tensor, weights_TK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_x_TD, grad_w_TK) from the actors' gradients of their rows and pairs; dropped assignments get 0."""
    grad_x_TD = _scatter_rows([(part, result.grad_x_ND) for part, result in answers], like_TD)
    grad_w_TK = torch.zeros(weights_TK.shape, dtype=torch.float32)
    for part, result in answers:
        assert result.grad_w_P is not None
        grad_w_TK.view(-1)[part.pair_slots_P] = result.grad_w_P.float()
    return grad_x_TD, grad_w_TK.to(weights_TK.dtype)


def _scatter_rows(parts: Sequence[tuple[DispatchPart, torch.Tensor | None]], like_TD: torch.Tensor) -> torch.Tensor:
    total_TD = torch.zeros(like_TD.shape, dtype=torch.float32)
    for part, rows_ND in parts:
        assert rows_ND is not None
        if part.every_row:
            total_TD += rows_ND
        else:
            total_TD.index_add_(0, part.rows_N, rows_ND.float())
    return total_TD.to(like_TD.dtype)
