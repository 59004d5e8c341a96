"""Tokens and their routing for the small model's MoE layer, and its expected output."""

import torch
from torch import nn

from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.types import Replica
from tests.support.expert.small_actor import (
    EXPERTS,
    LAYER,
    WIDTH,
)

TOKENS, TOP_K = 12, 2
HALVES = tuple(Replica(expert=expert, actor=f"expert-{expert.index // 2}") for expert in EXPERTS)
TWICE = tuple(Replica(expert=expert, actor=f"expert-{i}", share=0.5) for expert in EXPERTS for i in range(2))


def tokens(seed: int = 0, dropped: float = 0.2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns x_TD, ids_TK with some skipped assignments (index 4), and weights_TK."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(TOKENS, WIDTH, generator=generator)
    ids_TK = torch.stack([torch.randperm(len(EXPERTS), generator=generator)[:TOP_K] for _ in range(TOKENS)])
    ids_TK[torch.rand(TOKENS, TOP_K, generator=generator) < dropped] = len(EXPERTS)
    return x_TD, ids_TK, torch.rand(TOKENS, TOP_K, generator=generator)


def dense(
    modules: dict[int, nn.Module], x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    y_TD = torch.zeros_like(x_TD)
    for index, module in modules.items():
        rows, places = torch.where(ids_TK == index)
        y_TD = y_TD.index_add(0, rows, module(x_TD[rows]) * weights_TK[rows, places, None])
    return y_TD


@torch.no_grad()
def check_served(remote: RemoteExperts, modules: dict[int, nn.Module], seed: int = 0) -> None:
    batch = tokens(seed)
    torch.testing.assert_close(remote(LAYER, *batch), dense(modules, *batch), atol=5e-6, rtol=0)
