"""The two-phase optimizer against torch.optim, bit for bit."""

import pytest
import torch
from torch import nn

from moecluster.errors import CheckpointError
from moecluster.optim.two_phase import TwoPhaseOptimizer, is_decayed
from moecluster.types import OptimizerSettings


def make_module(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def reference(module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    named = list(module.named_parameters())
    groups = [
        {"params": [p for n, p in named if is_decayed(n, p)], "weight_decay": settings.weight_decay},
        {"params": [p for n, p in named if not is_decayed(n, p)], "weight_decay": 0.0},
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def random_grads(module: nn.Module, step: int, without: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    grads = {name: torch.randn(p.shape, generator=generator) for name, p in module.named_parameters()}
    grads.pop(without, None)
    return grads


SETTINGS = [
    OptimizerSettings(name="adamw", weight_decay=0.1),
    OptimizerSettings(name="sgd", weight_decay=0.1, momentum=0.9),
    OptimizerSettings(name="sgd"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["adamw", "sgd-momentum", "sgd"])
def test_equals_torch_optim_bit_for_bit(settings):
    ours, theirs = make_module(), make_module()
    optimizer = TwoPhaseOptimizer(dict(ours.named_parameters()), settings)
    torch_optimizer = reference(theirs, settings)
    for step in range(6):
        # In one step a parameter gets no gradient: torch.optim leaves it and its state unchanged.
        grads = random_grads(ours, step, without="0.weight" if step == 3 else "")
        for name, parameter in theirs.named_parameters():
            parameter.grad = grads[name] * 0.5 if name in grads else None
        for group in torch_optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        torch_optimizer.step()
        optimizer.prepare(grads, clip_scale=0.5, learning_rate=0.01 * (step + 1))
        optimizer.commit()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b), (step, name)


def test_nothing_moves_before_commit_and_abort_forgets():
    module = make_module()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = TwoPhaseOptimizer(dict(module.named_parameters()), OptimizerSettings())
    optimizer.prepare(random_grads(module, 0), clip_scale=1.0, learning_rate=0.1)
    assert optimizer.state() == {}
    optimizer.abort()
    with pytest.raises(AssertionError, match="commit without prepare"):
        optimizer.commit()
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=["adamw", "sgd-momentum"])
def test_state_goes_out_and_in(settings):
    """An optimizer that was saved and loaded continues like the original."""
    straight, moved = make_module(), make_module()
    optimizer = TwoPhaseOptimizer(dict(straight.named_parameters()), settings)
    resumed = TwoPhaseOptimizer(dict(moved.named_parameters()), settings)
    for step in range(4):
        if step == 2:
            state = {name: value.clone() for name, value in resumed.state().items()}
            resumed = TwoPhaseOptimizer(dict(moved.named_parameters()), settings, state)
        for module, which in ((straight, optimizer), (moved, resumed)):
            which.prepare(random_grads(module, step), clip_scale=1.0, learning_rate=0.01)
            which.commit()
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), moved.parameters(), strict=True))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("exp_avg/9.weight", torch.zeros(7, 5)),
        ("momentum_buffer/0.weight", torch.zeros(7, 5)),
        ("exp_avg/0.weight", torch.zeros(5, 7)),
    ],
)
def test_foreign_state_is_named(key, value):
    module = make_module()
    with pytest.raises(CheckpointError, match=key):
        TwoPhaseOptimizer(dict(module.named_parameters()), OptimizerSettings(), {key: value})


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("up_proj.weight", (4, 3), True),
        ("gate_up_proj", (8, 4, 3), True),
        ("gate_up_proj_bias", (8, 4), False),
        ("norm.weight", (4,), False),
    ],
)
def test_only_matrices_decay(name, shape, expected):
    assert is_decayed(name, torch.zeros(shape)) is expected
