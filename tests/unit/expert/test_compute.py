"""An actor's computation: merged batches, training passes against autograd, kept activations, and fixed blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moecluster.expert import compute
from moecluster.expert.activations import KeptActivations
from moecluster.expert.batch_invariant import BLOCK_ROWS, BlockRunner, prove
from moecluster.moe.experts.base import Expert
from moecluster.moe.experts.registry import make_expert
from moecluster.types import ComputeBatch, ComputeResult, MicroBatchTag, Phase, StepTag
from tests.support.expert.batches import assert_same_fields, make_batch

WIDTH, INNER, EXPERTS = 24, 40, 5
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of values around 1


def make_experts(dtype: torch.dtype = torch.float32, kind: str = "glu") -> dict[int, Expert]:
    torch.manual_seed(1)
    return {
        index: make_expert(kind, hidden_size=WIDTH, inner_size=INNER, activation="silu").to(dtype)
        for index in range(EXPERTS)
    }


def pair_experts(batch: ComputeBatch) -> list[int]:
    return [e for e, count in zip(batch.experts, batch.pair_counts, strict=True) for _ in range(count)]


def dense(
    experts: Mapping[int, nn.Module], batch: ComputeBatch, x_ND: torch.Tensor, weights_P: torch.Tensor
) -> torch.Tensor:
    """Computes the batch pair by pair, in float32, differentiably."""
    y_ND = torch.zeros(x_ND.shape)
    for p, expert in enumerate(pair_experts(batch)):
        row = batch.pair_rows_P[p : p + 1]
        y_ND = y_ND.index_add(0, row, (experts[expert](x_ND[row]) * weights_P[p]).float())
    return y_ND


@st.composite
def batches(draw: st.DrawFn, phase: Phase = Phase.FORWARD, dtype: torch.dtype = torch.float32) -> ComputeBatch:
    rows = draw(st.integers(1, 7))
    groups = draw(
        st.dictionaries(
            st.integers(0, EXPERTS - 1),
            # Ascending; a row may repeat if a token chose an expert twice.
            st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows + 2).map(sorted),
            min_size=1,
            max_size=EXPERTS,
        )
    )
    return make_batch(groups, rows=rows, width=WIDTH, phase=phase, dtype=dtype, seed=draw(st.integers(0, 99)))


# -- forward --


@settings(max_examples=60)
@given(waiting=st.lists(batches(), min_size=1, max_size=4), unsummed=st.booleans())
def test_merged_batches_equal_each_by_itself_and_the_dense_sum(waiting: list[ComputeBatch], unsummed: bool) -> None:
    experts = make_experts()
    numbered = [replace(batch, request_id=i, unsummed=unsummed) for i, batch in enumerate(waiting)]
    merged = compute.forward(experts, numbered)
    assert [result.request_id for result in merged] == list(range(len(waiting)))
    for batch, result in zip(numbered, merged, strict=True):
        (alone,) = compute.forward(experts, [batch])
        if unsummed:
            assert result.y_ND is None and result.y_PD is not None and alone.y_PD is not None
            expected_PD = torch.cat(
                [
                    experts[e](batch.x_ND[row][None])
                    for e, row in zip(pair_experts(batch), batch.pair_rows_P, strict=True)
                ]
            )
            torch.testing.assert_close(result.y_PD, expected_PD, atol=2e-6, rtol=0)
            torch.testing.assert_close(result.y_PD, alone.y_PD, atol=2e-6, rtol=0)
        else:
            assert result.y_PD is None and result.y_ND is not None and alone.y_ND is not None
            expected_ND = dense(experts, batch, batch.x_ND, batch.pair_weights_P)
            torch.testing.assert_close(result.y_ND, expected_ND, atol=5e-6, rtol=0)
            torch.testing.assert_close(result.y_ND, alone.y_ND, atol=5e-6, rtol=0)


class Counting(nn.Module):
    """An expert that doubles its input and records the number of rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x_nD: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x_nD))
        return x_nD * 2


def test_each_expert_runs_once_over_all_that_waits() -> None:
    counting = {index: Counting() for index in range(3)}
    waiting = [
        make_batch({0: [0, 1, 2], 1: [1]}, rows=3, width=4, seed=1),
        make_batch({0: [1], 2: [0, 1]}, rows=2, width=4, seed=2),
        make_batch({0: [0]}, rows=1, width=4, seed=3),
    ]
    compute.forward(counting, waiting)
    assert {index: module.calls for index, module in counting.items()} == {0: [5], 1: [1], 2: [2]}


def test_a_token_that_chose_an_expert_twice_counts_twice() -> None:
    """There are as many pairs as rows, but they do not cover every row."""
    batch = make_batch({0: [0, 0], 1: [1]}, rows=2, width=4)
    weights_P = batch.pair_weights_P
    (result,) = compute.forward({0: Counting(), 1: Counting()}, [batch])
    assert result.y_ND is not None
    expected_ND = 2 * batch.x_ND * torch.stack([weights_P[0] + weights_P[1], weights_P[2]])[:, None]
    torch.testing.assert_close(result.y_ND, expected_ND)
    trained, _ = compute.train_forward({0: Counting(), 1: Counting()}, batch)
    assert trained.y_ND is not None
    torch.testing.assert_close(trained.y_ND, expected_ND)


@pytest.mark.parametrize("rows", [[0], [0, 2]], ids=["every row", "some rows"])
def test_bfloat16_sums_are_kept_in_float32(rows: list[int]) -> None:
    experts = make_experts(torch.bfloat16)
    num_rows = rows[-1] + 1
    batch = make_batch({e: rows for e in range(EXPERTS)}, rows=num_rows, width=WIDTH, dtype=torch.bfloat16)
    exact_ND = torch.zeros(num_rows, WIDTH)
    weights_P = batch.pair_weights_P.view(EXPERTS, len(rows), 1)
    for e in range(EXPERTS):
        exact_ND[rows] += experts[e](batch.x_ND[rows]).detach().float() * weights_P[e]
    for result in (compute.forward(experts, [batch])[0], compute.train_forward(experts, batch)[0]):
        assert result.y_ND is not None and result.y_ND.dtype == torch.bfloat16
        assert torch.equal(result.y_ND, exact_ND.to(torch.bfloat16))  # rounded once


def test_the_sender_s_rows_are_only_read() -> None:
    batch = make_batch({0: [0, 1], 1: [1]}, rows=2, width=WIDTH)
    before = (batch.x_ND.clone(), batch.pair_weights_P.clone())
    compute.forward(make_experts(), [batch])
    compute.train_forward(make_experts(), batch)
    assert torch.equal(batch.x_ND, before[0]) and torch.equal(batch.pair_weights_P, before[1])


# -- training --


@settings(max_examples=60)
@given(batch=batches(Phase.BACKWARD), kind=st.sampled_from(["glu", "ffn"]))
def test_training_passes_equal_autograd_of_the_dense_sum(batch: ComputeBatch, kind: str) -> None:
    experts = make_experts(kind=kind)
    assert batch.grad_ND is not None
    x_ND, weights_P = batch.x_ND.clone().requires_grad_(), batch.pair_weights_P.clone().requires_grad_()
    y_ND = dense(experts, batch, x_ND, weights_P)
    named = {(e, name): p for e in batch.experts for name, p in experts[e].named_parameters()}
    expected = torch.autograd.grad((y_ND * batch.grad_ND).sum(), [x_ND, weights_P, *named.values()])

    forward_result, activations = compute.train_forward(experts, batch)
    assert forward_result.y_ND is not None
    torch.testing.assert_close(forward_result.y_ND, y_ND.detach(), atol=5e-6, rtol=0)
    result, gradients = compute.backward(experts, batch, activations)

    assert result.grad_x_ND is not None and result.grad_w_P is not None
    torch.testing.assert_close(result.grad_x_ND, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.grad_w_P, expected[1], atol=1e-5, rtol=1e-5)
    assert gradients.keys() == set(batch.experts)
    for (expert, name), gradient in zip(named, expected[2:], strict=True):
        torch.testing.assert_close(gradients[expert][name], gradient, atol=1e-5, rtol=1e-5)


Backward = tuple[ComputeResult, compute.ExpertGradients]


def assert_same_gradients(got: Backward, expected: Backward) -> None:
    assert_same_fields(got[0], expected[0])
    assert {e: g.keys() for e, g in got[1].items()} == {e: g.keys() for e, g in expected[1].items()}
    for expert, gradients in expected[1].items():
        for name, gradient in gradients.items():
            assert torch.equal(got[1][expert][name], gradient), f"{expert} {name}"


@settings(max_examples=30)
@given(batch=batches(Phase.BACKWARD))
def test_activations_computed_again_give_the_same_bits_as_kept_ones(batch: ComputeBatch) -> None:
    experts = make_experts()
    _, kept = compute.train_forward(experts, batch)
    _, again = compute.train_forward(experts, batch)
    assert_same_gradients(compute.backward(experts, batch, kept), compute.backward(experts, batch, again))


def test_activations_do_not_need_the_sender_s_memory_any_more() -> None:
    """Rows may lie in shared memory, which is overwritten after the reply."""
    experts = make_experts()
    batch = make_batch({0: [0, 1], 3: [1]}, rows=2, width=WIDTH, phase=Phase.BACKWARD)
    expected = compute.backward(experts, batch, compute.train_forward(experts, batch)[1])
    _, kept = compute.train_forward(experts, batch)
    batch.x_ND.fill_(torch.nan)
    batch.pair_weights_P.fill_(torch.nan)
    assert_same_gradients(compute.backward(experts, batch, kept), expected)


def test_frozen_experts_pass_gradients_on_and_keep_none() -> None:
    experts = make_experts()
    experts[1].requires_grad_(False)
    batch = make_batch({0: [0], 1: [0, 1]}, rows=2, width=WIDTH, phase=Phase.BACKWARD)
    _, activations = compute.train_forward(experts, batch)
    result, gradients = compute.backward(experts, batch, activations)
    assert gradients.keys() == {0}
    assert result.grad_x_ND is not None and result.grad_x_ND.abs().min() > 0


class Constant(nn.Module):
    """An expert that propagates no gradient to its input."""

    def forward(self, x_nD: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x_nD)


def test_an_expert_without_gradient_gives_zeros_for_rows_and_true_ones_for_weights() -> None:
    batch = make_batch({0: [0, 1]}, rows=2, width=WIDTH, phase=Phase.BACKWARD)
    _, activations = compute.train_forward({0: Constant()}, batch)
    result, gradients = compute.backward({0: Constant()}, batch, activations)
    assert gradients == {}
    assert batch.grad_ND is not None and result.grad_x_ND is not None and result.grad_w_P is not None
    assert torch.equal(result.grad_x_ND, torch.zeros(2, WIDTH))
    torch.testing.assert_close(result.grad_w_P, batch.grad_ND.sum(dim=1))


@pytest.mark.parametrize("kind", ["glu", "ffn"])
def test_the_size_of_activations_counts_rows_and_not_parameters(kind: str) -> None:
    expert = {0: make_expert(kind, hidden_size=WIDTH, inner_size=10_000, activation="silu")}
    parameter_bytes = sum(p.numel() * p.element_size() for p in expert[0].parameters())
    few, many = (
        compute.train_forward(
            expert, make_batch({0: list(range(rows))}, rows=rows, width=WIDTH, phase=Phase.TRAIN_FORWARD)
        )[1]
        for rows in (1, 10)
    )
    assert 10_000 * 4 <= few.size_bytes < parameter_bytes / 2
    assert many.size_bytes == pytest.approx(10 * few.size_bytes, rel=0.01)


# -- kept activations --


def kept_of(size_bytes: int) -> compute.Activations:
    nothing = torch.empty(0)
    return compute.Activations(x_ND=nothing, weights_P=nothing, y_ND=nothing, size_bytes=size_bytes)


def tag(step: int, micro_batch: int = 0) -> MicroBatchTag:
    return MicroBatchTag(step=StepTag(term=1, step=step, attempt=0), micro_batch=micro_batch)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 60)), max_size=40))
def test_the_budget_is_never_exceeded_and_the_newest_stay(entries: Sequence[tuple[int, int, int]]) -> None:
    store = KeptActivations(budget_bytes=100)
    order: list[tuple[MicroBatchTag, int]] = []
    sizes: dict[tuple[MicroBatchTag, int], int] = {}
    for step, layer, size_bytes in entries:
        key = (tag(step), layer)
        store.keep(key, kept_of(size_bytes))
        order = [k for k in order if k != key] + [key]
        sizes[key] = size_bytes
        while sum(sizes[k] for k in order) > 100:
            order.pop(0)
        assert store.size_bytes == sum(sizes[k] for k in order) <= 100
    for key in {(tag(step), layer) for step in range(4) for layer in range(4)}:
        found = store.take(key)
        assert (found is not None) == (key in order)
        assert found is None or found.size_bytes == sizes[key]
        assert store.take(key) is None
    assert store.size_bytes == 0


def test_what_is_larger_than_the_budget_is_not_kept_and_drops_nothing() -> None:
    store = KeptActivations(budget_bytes=100)
    store.keep((tag(1), 0), kept_of(40))
    store.keep((tag(1), 1), kept_of(101))
    assert store.take((tag(1), 1)) is None and store.size_bytes == 40
    assert store.take((tag(1), 0)) is not None


def test_forgetting_an_attempt_forgets_older_ones_too() -> None:
    store = KeptActivations(budget_bytes=100)
    for step in (1, 2, 3):
        store.keep((tag(step), 0), kept_of(10))
    store.forget(tag(2).step)
    assert store.size_bytes == 10 and store.take((tag(3), 0)) is not None
    store.keep((tag(4), 0), kept_of(10))
    store.forget()
    assert store.size_bytes == 0


# -- blocks --


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "packed"])
def wide_expert(request: pytest.FixtureRequest, dtype: torch.dtype) -> Expert:
    """An expert wide enough that the kernel depends on the number of rows."""
    torch.manual_seed(3)
    expert = make_expert("glu", hidden_size=128, inner_size=192, activation="silu").to(dtype).requires_grad_(False)
    if request.param:
        expert.pack()
    return expert


@torch.no_grad()
def test_a_row_in_blocks_is_the_same_bit_for_bit_in_any_company(wide_expert: Expert, dtype: torch.dtype) -> None:
    sizes = prove(wide_expert, 128, dtype)
    run = BlockRunner(sizes)
    generator = torch.Generator().manual_seed(4)
    x_nD = torch.randn(5, 128, generator=generator).to(dtype)
    alone = torch.cat([run(wide_expert, row_1D) for row_1D in x_nD.split(1)])
    for company in (1, 3, 7, 8, 59, 64, 200, 507, 520, 1100):
        others = torch.randn(company, 128, generator=generator).to(dtype) * 100
        order = torch.randperm(company + 5, generator=generator)
        mixed = torch.cat([x_nD, others])[order]
        places = torch.argsort(order)[:5]
        assert torch.equal(run(wide_expert, mixed)[places], alone), f"beside {company} others, in blocks of {sizes}"


def test_blocks_have_only_the_sizes_that_were_proven() -> None:
    seen: list[int] = []

    def watched(x_nD: torch.Tensor) -> torch.Tensor:
        seen.append(len(x_nD))
        return x_nD + 1

    x_nD = torch.arange(600.0)[:, None]
    assert torch.equal(BlockRunner()(watched, x_nD), x_nD + 1)
    assert seen == [512, 64, 8, 8, 8]  # no padding needed: 600 = 512 + 64 + 3 * 8
    seen.clear()
    assert torch.equal(BlockRunner((8, 64))(watched, x_nD[:75]), x_nD[:75] + 1)
    assert seen == [64, 8, 8]
    seen.clear()
    assert torch.equal(BlockRunner((8,))(watched, x_nD[:3]), x_nD[:3] + 1)
    assert seen == [8]


def rounds_like(size_that_differs: int) -> object:
    def row_function(x_nD: torch.Tensor) -> torch.Tensor:
        y_nD = x_nD.clone()
        if len(x_nD) == size_that_differs:
            y_nD[-1] = torch.nextafter(y_nD[-1], torch.full_like(y_nD[-1], torch.inf))
        return y_nD

    return row_function


@pytest.mark.parametrize(
    ("size_that_differs", "proven"),
    [(64, (8, 512)), (512, (8, 64)), (8, (8,)), (16, BLOCK_ROWS)],
)
def test_the_proof_finds_sizes_that_round_differently(size_that_differs: int, proven: tuple[int, ...]) -> None:
    """Here they differ in the last bit of the last row of a block."""
    row_function = rounds_like(size_that_differs)
    assert callable(row_function)
    assert prove(row_function, 16, torch.float32) == proven


def test_batches_in_blocks_get_the_same_bits_merged_or_alone() -> None:
    experts = make_experts()
    run = BlockRunner(prove(experts[0], WIDTH, torch.float32))
    first = make_batch({0: [0, 2], 2: [1, 2]}, rows=3, width=WIDTH, seed=1, unsummed=True)
    others = [
        make_batch({e: list(range(70)) for e in range(EXPERTS)}, rows=70, width=WIDTH, seed=s, unsummed=True)
        for s in (2, 3)
    ]
    (alone,) = compute.forward(experts, [first], run)
    assert_same_fields(compute.forward(experts, [*others, first], run)[2], alone)
    trained, _ = compute.train_forward(experts, replace(first, phase=Phase.TRAIN_FORWARD), run)
    assert_same_fields(trained, alone)
