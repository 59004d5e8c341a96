"""Small gates with random weights, for the tests of gating."""

import torch

from moecluster.moe.gates.base import Gate, Routing
from moecluster.moe.gates.registry import make_gate

NUM_EXPERTS, HIDDEN = 8, 16
TOP_K = {"switch": 1}
OPTIONS = {"deepseek-v3": {"n_group": 4, "topk_group": 2}}


def gate_of(name: str, seed: int = 0, **options: object) -> Gate:
    torch.manual_seed(seed)
    gate = make_gate(
        name,
        hidden_size=HIDDEN,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K.get(name, 2),
        **{**OPTIONS.get(name, {}), **options},
    )
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return gate


def same(a: Routing, b: Routing) -> bool:
    return torch.equal(a.ids_TK, b.ids_TK) and torch.equal(a.weights_TK, b.weights_TK)


def losses_of(gate: Gate, routing: Routing) -> dict[str, torch.Tensor]:
    return {**routing.aux_losses, **gate.pooled_losses([routing.pool])}
