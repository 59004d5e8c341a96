"""Dispatch and combine are inverses, and a token's replica depends only on the token.

Rows, weights and experts are small dyadic numbers, so that float32 sums are exact in any order and equal bit for bit.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moecluster.dispatch.permute import (
    DispatchPart,
    combine,
    combine_gradients,
    combine_pairs,
    dispatch,
    kept_slots,
    rows_of,
)
from moecluster.dispatch.replica_choice import NO_ACTOR, layer_table
from moecluster.errors import NotHosted
from moecluster.types import ComputeResult, Placement
from tests.unit.dispatch.layer_placement import LAYER, WIDTH, expert_of_pairs, make_placement


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch, its routing, two placements of the experts, and the experts: matrices."""

    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    matrices_EDD: torch.Tensor
    placement: Placement
    other_placement: Placement

    @property
    def num_experts(self) -> int:
        return len(self.matrices_EDD)

    def parts(self, placement: Placement | None = None) -> tuple[DispatchPart, ...]:
        return dispatch(layer_table(placement or self.placement, LAYER), self.x_TD, self.ids_TK, self.weights_TK)

    def dense(self, x_TD: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The layer in one place, differentiable."""
        y_TD = torch.zeros_like(x_TD)
        for k in range(self.ids_TK.shape[1]):
            for expert in range(self.num_experts):
                chosen_T1 = (self.ids_TK[:, k] == expert).float()[:, None]
                y_TD = y_TD + chosen_T1 * weights_TK[:, k, None] * (x_TD @ self.matrices_EDD[expert])
        return y_TD


@st.composite
def placements(draw: st.DrawFn, num_experts: int) -> Placement:
    actors = [f"actor-{i}" for i in range(draw(st.integers(1, 4)))]
    shares = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 1.0])
    holders = [
        draw(st.dictionaries(st.sampled_from(actors), shares, min_size=1, max_size=len(actors)))
        for _ in range(num_experts)
    ]
    return make_placement(holders, actors)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_tokens, top_k, num_experts = draw(st.integers(0, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def dyadic(*shape: int, denominator: int = 1) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float() / denominator

    x_TD, weights_TK = dyadic(num_tokens, WIDTH), dyadic(num_tokens, top_k, denominator=64)
    if num_tokens > 2:  # equal tokens, with equal weights but different experts
        x_TD[-1], weights_TK[-1] = x_TD[0], weights_TK[0]
    # Two indices beyond the last expert: assignments to skip. A token may choose an expert twice.
    ids_TK = torch.randint(0, num_experts + 2, (num_tokens, top_k), generator=generator)
    return Case(
        x_TD=x_TD,
        ids_TK=ids_TK,
        weights_TK=weights_TK,
        matrices_EDD=dyadic(num_experts, WIDTH, WIDTH),
        placement=draw(placements(num_experts)),
        other_placement=draw(placements(num_experts)),
    )


def answer(case: Case, part: DispatchPart) -> ComputeResult:
    """The reply of the part's actor: weighted partial sums."""
    x_ND = rows_of(part, case.x_TD)
    y_ND = torch.zeros_like(x_ND)
    for p, expert in enumerate(expert_of_pairs(part)):
        row = part.pair_rows_P[p]
        y_ND[row] += part.pair_weights_P[p] * (x_ND[row] @ case.matrices_EDD[expert])
    return ComputeResult(request_id=0, y_ND=y_ND)


@given(cases())
def test_every_kept_assignment_goes_once_to_an_actor_that_holds_the_expert(case: Case) -> None:
    top_k = case.ids_TK.shape[1]
    parts = case.parts()
    assert [part.actor for part in parts] == sorted({part.actor for part in parts})
    seen: list[int] = []
    for part in parts:
        rows, slots = part.rows_N.tolist(), part.pair_slots_P.tolist()
        experts = expert_of_pairs(part)
        held = {expert.index for expert in case.placement.experts_on(part.actor)}
        assert set(part.experts) <= held and list(part.experts) == sorted(set(part.experts))
        assert rows == sorted(set(rows)) and part.every_row == (len(rows) == len(case.x_TD))
        assert experts == case.ids_TK.view(-1)[part.pair_slots_P].tolist()
        assert torch.equal(part.pair_weights_P, case.weights_TK.view(-1)[part.pair_slots_P])
        assert [rows[row] for row in part.pair_rows_P.tolist()] == [slot // top_k for slot in slots]
        assert {slot // top_k for slot in slots} == set(rows)  # no unnecessary rows
        # By expert, then by row: actors rely on this order.
        assert list(zip(experts, slots, strict=True)) == sorted(zip(experts, slots, strict=True))
        assert part.pair_rows_P.dtype == torch.int32 and part.pair_weights_P.dtype == torch.float32
        seen += slots
    assert sorted(seen) == np.flatnonzero(case.ids_TK.view(-1).numpy() < case.num_experts).tolist()


@given(cases())
def test_partial_sums_of_the_actors_combine_to_the_dense_layer(case: Case) -> None:
    answers = [(part, answer(case, part)) for part in case.parts()]
    assert torch.equal(combine(answers, case.x_TD), case.dense(case.x_TD, case.weights_TK))


def test_partial_sums_in_bfloat16_are_added_in_float32() -> None:
    holders: list[dict[str, float]] = [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}]
    table = layer_table(make_placement(holders, ["a", "b", "c"]), LAYER)
    ids_TK = torch.tensor([[0, 1, 2], [0, 1, 3], [1, 2, 3]])  # no actor gets every row but b
    parts = dispatch(table, torch.randn(3, WIDTH), ids_TK, torch.rand(3, 3))
    answers = [
        (part, ComputeResult(request_id=0, y_ND=torch.randn(len(part.rows_N), WIDTH).bfloat16())) for part in parts
    ]
    exact_TD = torch.zeros(3, WIDTH)
    for part, result in answers:
        assert result.y_ND is not None
        exact_TD[part.rows_N] += result.y_ND.float()
    assert torch.equal(combine(answers, torch.empty(3, WIDTH).bfloat16()), exact_TD.bfloat16())


@given(cases(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_unsummed_pairs_combine_bit_for_bit_whatever_the_parts(case: Case, dtype: torch.dtype) -> None:
    """With outputs whose sums round."""
    num_tokens, top_k = case.ids_TK.shape
    pairs_SD = torch.randn(num_tokens * top_k, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights_TK = case.weights_TK / 3

    expected_TD = torch.zeros(num_tokens, WIDTH)
    for t in range(num_tokens):
        for k in range(top_k):
            if case.ids_TK[t, k] < case.num_experts:
                expected_TD[t] += pairs_SD[t * top_k + k].float() * weights_TK[t, k]

    for placement in (case.placement, case.other_placement):
        answers = [
            (part, ComputeResult(request_id=0, y_PD=pairs_SD[part.pair_slots_P])) for part in case.parts(placement)
        ]
        y_TD = combine_pairs(answers[::-1], weights_TK, case.x_TD.to(dtype))
        assert y_TD.dtype == dtype
        assert torch.equal(y_TD, expected_TD.to(dtype))


@given(cases())
def test_gradients_equal_autograd_of_the_dense_layer(case: Case) -> None:
    grad_TD = (torch.arange(case.x_TD.numel()) % 7 - 3).float().view(case.x_TD.shape)
    x_TD, weights_TK = case.x_TD.clone().requires_grad_(), case.weights_TK.clone().requires_grad_()
    expected = torch.autograd.grad((case.dense(x_TD, weights_TK) * grad_TD).sum(), [x_TD, weights_TK])

    answers = []
    for part in case.parts():
        x_ND, grad_ND = rows_of(part, case.x_TD), rows_of(part, grad_TD)
        grad_x_ND, grad_w_P = torch.zeros_like(x_ND), torch.zeros(len(part.pair_rows_P))
        for p, expert in enumerate(expert_of_pairs(part)):
            row, matrix_DD = part.pair_rows_P[p], case.matrices_EDD[expert]
            grad_x_ND[row] += part.pair_weights_P[p] * (matrix_DD @ grad_ND[row])
            grad_w_P[p] = (x_ND[row] @ matrix_DD) @ grad_ND[row]
        answers.append((part, ComputeResult(request_id=0, grad_x_ND=grad_x_ND, grad_w_P=grad_w_P)))
    grad_x_TD, grad_w_TK = combine_gradients(answers, grad_TD, case.weights_TK)
    assert torch.equal(grad_x_TD, expected[0])
    assert torch.equal(grad_w_TK, expected[1])


@given(cases())
def test_a_token_takes_the_same_replicas_in_any_batch(case: Case) -> None:
    def actor_of_slots(tokens: slice | torch.Tensor) -> dict[int, str]:
        batch = case.x_TD[tokens], case.ids_TK[tokens], case.weights_TK[tokens]
        parts = dispatch(layer_table(case.placement, LAYER), *batch)
        return {slot: part.actor for part in parts for slot in part.pair_slots_P.tolist()}

    top_k = case.ids_TK.shape[1]
    together = actor_of_slots(slice(None))
    reversed_batch = actor_of_slots(torch.arange(len(case.x_TD) - 1, -1, -1))
    for t in range(len(case.x_TD)):
        alone = actor_of_slots(slice(t, t + 1))
        turned = len(case.x_TD) - 1 - t
        for k in range(top_k):
            assert together.get(t * top_k + k) == alone.get(k) == reversed_batch.get(turned * top_k + k)


@given(cases(), st.data())
def test_what_an_actor_failed_to_answer_goes_to_the_others(case: Case, data: st.DataObject) -> None:
    parts = case.parts()
    if not parts:
        return
    failed = data.draw(st.sampled_from(parts))
    left = layer_table(case.placement, LAYER, avoid={failed.actor})
    alone = [e for e in failed.experts if (left.actor_of_ER[e] == NO_ACTOR).all()]
    slots_P = np.sort(failed.pair_slots_P.numpy())
    if alone:
        with pytest.raises(NotHosted) as caught:
            dispatch(left, case.x_TD, case.ids_TK, case.weights_TK, slots_P=slots_P)
        assert str(caught.value) == f"layer {LAYER}: no replica of experts {alone}"
        return
    again = dispatch(left, case.x_TD, case.ids_TK, case.weights_TK, slots_P=slots_P)
    assert failed.actor not in {part.actor for part in again}
    assert sorted(slot for part in again for slot in part.pair_slots_P.tolist()) == slots_P.tolist()
    kept = [part for part in parts if part is not failed]
    answers = [(part, answer(case, part)) for part in (*kept, *again)]
    assert torch.equal(combine(answers, case.x_TD), case.dense(case.x_TD, case.weights_TK))


def test_only_indices_beyond_the_last_expert_are_skipped() -> None:
    assert kept_slots(torch.tensor([[0, 4], [7, 3]]), 4).tolist() == [0, 3]
