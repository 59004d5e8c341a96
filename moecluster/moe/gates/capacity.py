"""Expert capacity, and dropping assignments beyond it."""

import math

import torch


def count_assignments(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Returns the assignments to each expert, int64 [E]. Does not count ids >= E (skip)."""
    return torch.bincount(ids_TK.flatten(), minlength=num_experts)[:num_experts]


def expert_capacity(num_tokens: int, *, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """Returns an expert's capacity: its even share of the assignments times the factor, rounded up (Switch, equation
    3)."""
    return math.ceil(num_tokens * top_k * capacity_factor / num_experts)


def drop_beyond_capacity(
    ids_TK: torch.Tensor, capacity: int, num_experts: int, *, priority_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the ids, with num_experts ("skip") where an expert already has `capacity` assignments.

    All first choices come before second choices; within each, tokens are taken by position, or by highest priority
    first (V-MoE's batch prioritized routing). Ids >= num_experts use no capacity.
    """
    num_tokens, top_k = ids_TK.shape
    order_T = torch.arange(num_tokens, device=ids_TK.device)
    if priority_T is not None:
        order_T = torch.argsort(priority_T, descending=True, stable=True)
    queue_P = ids_TK[order_T].T.flatten()  # in the order in which capacity is assigned
    by_expert_P = torch.argsort(queue_P, stable=True)
    sorted_P = queue_P[by_expert_P]
    rank_P = torch.arange(queue_P.shape[0], device=ids_TK.device) - torch.searchsorted(sorted_P, sorted_P)
    kept_P = torch.empty_like(queue_P)
    kept_P[by_expert_P] = torch.where(rank_P < capacity, sorted_P, num_experts)
    result_TK = torch.empty_like(ids_TK)
    result_TK[order_T] = kept_P.view(top_k, num_tokens).T
    return result_TK
