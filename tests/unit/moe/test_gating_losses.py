"""Losses and capacity against values worked out by hand, and against direct formulas."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecluster.moe.gates.capacity import count_assignments, drop_beyond_capacity, expert_capacity
from moecluster.moe.gates.losses import (
    cv_squared,
    entropy,
    load_balance_loss,
    sequence_balance_loss,
    smooth_load,
    z_loss,
)


def test_load_balance_loss_by_hand() -> None:
    # 4 experts, f = (1, .5, .5, 0), P = (.4, .3, .2, .1): 4 * (.4 + .15 + .1) = 2.6
    loss = load_balance_loss(torch.tensor([1.0, 0.5, 0.5, 0.0]), torch.tensor([0.4, 0.3, 0.2, 0.1]))
    torch.testing.assert_close(loss, torch.tensor(2.6))


def test_load_balance_loss_of_perfect_balance_is_top_k() -> None:
    torch.testing.assert_close(load_balance_loss(torch.full((8,), 2 / 8), torch.full((8,), 1 / 8)), torch.tensor(2.0))


def test_z_loss_by_hand() -> None:
    # logsumexp of two zeros is log 2, of (log 3, 0) log 4.
    logits_TE = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    torch.testing.assert_close(z_loss(logits_TE), torch.tensor((math.log(2) ** 2 + math.log(4) ** 2) / 2))


def test_entropy_by_hand() -> None:
    probs_TE = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(entropy(probs_TE), torch.tensor(math.log(2) / 2))


def test_cv_squared_by_hand() -> None:
    torch.testing.assert_close(cv_squared(torch.tensor([1.0, 3.0])), torch.tensor(0.25))  # mean 2, variance 1
    assert cv_squared(torch.zeros(4)) == 0
    assert cv_squared(torch.tensor([5.0])) == 0


def test_sequence_balance_by_hand() -> None:
    # Sequence 0: both tokens choose expert 0, f = (2, 0), P = (.8, .2): 1.6. Sequence 7: f = (0, 2), P = (.3, .7): 1.4.
    probs_TE = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.7, 0.3]])
    loss = sequence_balance_loss(torch.tensor([[0], [1], [0]]), probs_TE, torch.tensor([0, 7, 0]))
    torch.testing.assert_close(loss, torch.tensor((1.6 + 1.4) / 2))


def test_smooth_load_is_the_probability_of_staying() -> None:
    torch.manual_seed(0)
    clean_TE, noisy_TE, std_TE = torch.randn(5, 6), torch.randn(5, 6), torch.rand(5, 6) + 0.1
    expected_E = torch.zeros(6)
    for t in range(5):
        for i in range(6):
            others = torch.cat([noisy_TE[t, :i], noisy_TE[t, i + 1 :]]).sort(descending=True).values
            z = float((clean_TE[t, i] - others[1]) / std_TE[t, i])
            expected_E[i] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
    torch.testing.assert_close(smooth_load(clean_TE, noisy_TE, std_TE, top_k=2), expected_E)


def test_smooth_load_when_every_expert_is_chosen() -> None:
    assert smooth_load(torch.randn(5, 3), torch.randn(5, 3), torch.ones(5, 3), top_k=3).tolist() == [5.0, 5.0, 5.0]


@given(
    noise_logits=st.lists(st.floats(-1e4, 1e4), min_size=6, max_size=6), seed=st.integers(0, 99), double=st.booleans()
)
@settings(deadline=None)
def test_smooth_load_has_a_gradient_for_any_noise(noise_logits: list[float], seed: int, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    generator = torch.Generator().manual_seed(seed)
    clean_TE, drawn_TE = (torch.randn(5, 6, generator=generator, dtype=dtype) for _ in range(2))
    clean_TE[0] = 1.0  # without noise these are equal
    raw_E = torch.tensor(noise_logits, dtype=dtype).requires_grad_()
    std_TE = torch.nn.functional.softplus(raw_E).expand(5, 6)
    clean_TE.requires_grad_()
    load_E = smooth_load(clean_TE, clean_TE + drawn_TE * std_TE, std_TE, top_k=2)
    cv_squared(load_E).backward()
    assert torch.isfinite(load_E).all()
    for grad in (raw_E.grad, clean_TE.grad):
        assert grad is not None and torch.isfinite(grad).all()


def test_smooth_load_is_as_it_was_where_there_is_noise() -> None:
    torch.manual_seed(0)
    clean_TE, noisy_TE = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    raw_TE = (torch.rand(5, 6, dtype=torch.float64) * 20 - 10).requires_grad_()  # noise from 5e-5 to 10
    best = noisy_TE.topk(3).values
    excluding_TE = torch.where(noisy_TE > best[:, 2:], best[:, 2:], best[:, 1:2])
    plain_E = torch.special.ndtr((clean_TE - excluding_TE) / torch.nn.functional.softplus(raw_TE)).sum(dim=0)
    (expected,) = torch.autograd.grad(cv_squared(plain_E), raw_TE)
    load_E = smooth_load(clean_TE, noisy_TE, torch.nn.functional.softplus(raw_TE), top_k=2)
    assert torch.equal(load_E, plain_E)
    assert torch.equal(torch.autograd.grad(cv_squared(load_E), raw_TE)[0], expected)


def test_entropy_has_a_gradient_where_a_probability_underflows() -> None:
    logits_TE = torch.tensor([[0.0, 200.0, -1e4]]).requires_grad_()
    entropy(logits_TE.softmax(dim=-1)).backward()
    assert logits_TE.grad is not None and torch.isfinite(logits_TE.grad).all()


def test_expert_capacity_rounds_up() -> None:
    assert expert_capacity(100, top_k=1, num_experts=8, capacity_factor=1.25) == 16  # 15.625
    assert expert_capacity(1, top_k=1, num_experts=64, capacity_factor=1.0) == 1


def test_drop_by_position_and_by_priority() -> None:
    ids_TK = torch.tensor([[0], [0], [1], [0]])
    assert drop_beyond_capacity(ids_TK, 2, 2).tolist() == [[0], [0], [1], [2]]
    priority_T = torch.tensor([0.1, 0.9, 0.5, 0.8])
    assert drop_beyond_capacity(ids_TK, 2, 2, priority_T=priority_T).tolist() == [[2], [0], [1], [0]]


def test_first_choices_go_before_second_ones() -> None:
    ids_TK = torch.tensor([[1, 0], [0, 1]])
    assert drop_beyond_capacity(ids_TK, 1, 2).tolist() == [[1, 2], [0, 2]]


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 20),
    top_k=st.integers(1, 3),
    num_experts=st.integers(3, 6),
    capacity=st.integers(0, 8),
    by_priority=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_dropping_equals_filling_one_by_one(
    num_tokens: int, top_k: int, num_experts: int, capacity: int, by_priority: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(num_tokens, num_experts + 1, generator=generator).argsort(dim=1)[:, :top_k]  # some skip
    priority_T = torch.rand(num_tokens, generator=generator) if by_priority else None
    order = range(num_tokens) if priority_T is None else priority_T.argsort(descending=True, stable=True).tolist()
    expected, taken = ids_TK.clone(), [0] * num_experts
    for k in range(top_k):
        for t in order:
            expert = int(ids_TK[t, k])
            if expert == num_experts:
                continue
            if taken[expert] >= capacity:
                expected[t, k] = num_experts
            taken[expert] += 1
    result = drop_beyond_capacity(ids_TK, capacity, num_experts, priority_T=priority_T)
    assert torch.equal(result, expected)
    assert count_assignments(result, num_experts).tolist() == [min(n, capacity) for n in taken]
