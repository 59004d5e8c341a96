"""Expert kinds against their formulas."""

import pytest
import torch
from torch.nn import functional as F

from moecluster.errors import ConfigError
from moecluster.moe.experts.registry import EXPERT_KINDS, make_expert

ACTIVATIONS = {"relu": torch.relu, "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)), "silu": F.silu}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ffn_formula(activation: str) -> None:
    expert = make_expert("ffn", hidden_size=6, inner_size=10, activation=activation)
    up_FD, down_DF = expert.get_parameter("up_proj.weight"), expert.get_parameter("down_proj.weight")
    assert up_FD.shape == (10, 6) and down_DF.shape == (6, 10)
    x_nD = torch.randn(5, 6)
    torch.testing.assert_close(expert(x_nD), ACTIVATIONS[activation](x_nD @ up_FD.T) @ down_DF.T)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_formula(activation: str) -> None:
    expert = make_expert("glu", hidden_size=6, inner_size=10, activation=activation)
    gate_up, down_DF = expert.get_parameter("gate_up_proj.weight"), expert.get_parameter("down_proj.weight")
    assert gate_up.shape == (20, 6) and down_DF.shape == (6, 10)
    x_nD = torch.randn(5, 6)
    expected = (ACTIVATIONS[activation](x_nD @ gate_up[:10].T) * (x_nD @ gate_up[10:].T)) @ down_DF.T
    torch.testing.assert_close(expert(x_nD), expected)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_keep_dtype_take_no_rows_and_give_gradients(kind: str, dtype: torch.dtype) -> None:
    expert = make_expert(kind, hidden_size=6, inner_size=10, activation="silu").to(dtype)
    assert expert(torch.empty(0, 6, dtype=dtype)).shape == (0, 6)
    x_nD = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    y_nD = expert(x_nD)
    assert y_nD.dtype == dtype
    y_nD.sum().backward()
    assert x_nD.grad is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in expert.parameters())


@pytest.mark.parametrize(
    ("kind", "activation", "part"),
    [
        ("gul", "silu", r"model\.expert_kind: got \"gul\".*did you mean glu"),
        ("glu", "silo", r"model\.activation: got \"silo\".*did you mean silu"),
    ],
)
def test_unknown_kinds_and_activations(kind: str, activation: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        make_expert(kind, hidden_size=6, inner_size=10, activation=activation)
