"""The MoE layer and the batches that all contenders compute, made equal by seed.

The layer has the shape of a small Mixtral block: E = 8 SwiGLU experts, K = 2 per token.
Shape letters: T tokens, D model width, F expert inner width, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch

from benchmarks.case import Case, DType

D_MODEL = 1024
D_INNER = 3584
NUM_EXPERTS = 8
TOP_K = 2
NUM_BATCHES = 8  # calls cycle through them, so that inputs, and experts at few tokens, are not in the CPU cache
WEIGHT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One layer call: x_TD and the output's gradient grad_TD in the case's dtype, with the gate's choice."""

    x_TD: torch.Tensor
    ids_TK: torch.Tensor  # int64 in [0, E), distinct in a row
    weights_TK: torch.Tensor  # float32 (as transformers' gates give them), rows sum to 1
    grad_TD: torch.Tensor


def torch_dtype(dtype: DType) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def make_batches(case: Case) -> tuple[Batch, ...]:
    """Returns batches of normal rows and uniformly drawn experts, the same for every contender of a case."""
    generator = torch.Generator().manual_seed(case.tokens)
    return tuple(_make_batch(case, generator) for _ in range(NUM_BATCHES))


def _make_batch(case: Case, generator: torch.Generator) -> Batch:
    x_TD, grad_TD = torch.randn(2, case.tokens, D_MODEL, generator=generator).to(torch_dtype(case.dtype))
    scores_TE = torch.rand(case.tokens, NUM_EXPERTS, generator=generator)
    top_TK, ids_TK = scores_TE.topk(TOP_K, dim=-1)
    return Batch(x_TD=x_TD, ids_TK=ids_TK, weights_TK=top_TK / top_TK.sum(-1, keepdim=True), grad_TD=grad_TD)


def make_expert(index: int, dtype: DType) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns one expert's weights as in transformers' Mixtral: gate_up [2F, D] (gate first) and down [D, F]."""
    generator = torch.Generator().manual_seed(index)
    gate_up = torch.randn(2 * D_INNER, D_MODEL, generator=generator) * WEIGHT_STD
    down = torch.randn(D_MODEL, D_INNER, generator=generator) * WEIGHT_STD
    return gate_up.to(torch_dtype(dtype)), down.to(torch_dtype(dtype))
