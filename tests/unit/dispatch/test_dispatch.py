"""Dispatch and combine are an inverse pair, and a token's replica depends on the token alone.

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
from moecluster.dispatch.replica_choice import NO_ACTOR, LayerTable, layer_table
from moecluster.errors import NotHosted
from moecluster.types import ActorAddress, ComputeResult, ExpertId, Placement, Replica

LAYER = 3
WIDTH = 4
DRAWS = 20_000


def make_placement(holders: list[dict[str, float]], actors: list[str]) -> Placement:
    """holders: of each expert, the share of every actor that holds it."""
    return Placement(
        term=1,
        generation=1,
        layer_experts={LAYER: len(holders)},
        actors={name: ActorAddress(actor=name, address="", incarnation="") for name in actors},
        replicas=tuple(
            Replica(expert=ExpertId(layer=LAYER, index=index), actor=actor, share=share)
            for index, shares in enumerate(holders)
            for actor, share in shares.items()
        ),
    )


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
    if num_tokens > 2:  # equal tokens, with equal weights but experts of their own
        x_TD[-1], weights_TK[-1] = x_TD[0], weights_TK[0]
    # Two indices beyond the last expert: assignments to skip. An expert may come twice in one token's choice.
    ids_TK = torch.randint(0, num_experts + 2, (num_tokens, top_k), generator=generator)
    return Case(
        x_TD=x_TD,
        ids_TK=ids_TK,
        weights_TK=weights_TK,
        matrices_EDD=dyadic(num_experts, WIDTH, WIDTH),
        placement=draw(placements(num_experts)),
        other_placement=draw(placements(num_experts)),
    )


def expert_of_pairs(part: DispatchPart) -> list[int]:
    return [e for e, count in zip(part.experts, part.pair_counts, strict=True) for _ in range(count)]


def answer(case: Case, part: DispatchPart) -> ComputeResult:
    """What the part's actor returns: weighted partial sums."""
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
        assert {slot // top_k for slot in slots} == set(rows)  # no row that nobody needs
        # By expert, then by row: what an actor relies on.
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


def drawn_tokens(generator: torch.Generator, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x_TD, and weights_TK that are all equal, as of a hash gate or a renormalised top-1: rows tell tokens apart."""
    return torch.randn(DRAWS, WIDTH, generator=generator), torch.full((DRAWS, top_k), 1 / top_k)


def fractions(
    table: LayerTable, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> dict[str, float]:
    """Actor -> the part of the assignments that it gets."""
    parts = dispatch(table, x_TD, ids_TK, weights_TK)
    return {part.actor: len(part.pair_slots_P) / ids_TK.numel() for part in parts}


def assert_binomial(observed: float, share: float, draws: int) -> None:
    """Within five standard deviations of a count of `draws` with the probability `share`."""
    assert abs(observed - share) <= 5 * (share * (1 - share) / draws) ** 0.5


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (1.0, 0.0, 3.0), (0.0, 0.0, 0.0), (1 / 3, 1 / 3, 1 / 3)])
def test_observed_fractions_follow_the_shares(shares: tuple[float, ...]) -> None:
    actors = ["a", "b", "c"]
    both = dict(zip(actors, shares, strict=True))
    placement = make_placement([both, both], actors)
    x_TD, weights_TK = drawn_tokens(torch.Generator().manual_seed(1), 2)
    ids_TK = torch.tensor([0, 1]).expand(DRAWS, 2).contiguous()
    parts = {part.actor: part for part in dispatch(layer_table(placement, LAYER), x_TD, ids_TK, weights_TK)}
    total = sum(shares)
    expected = [share / total if total else 1 / 3 for share in shares]
    for expert in (0, 1):
        for actor, share in zip(actors, expected, strict=True):
            got = expert_of_pairs(parts[actor]).count(expert) if actor in parts else 0
            assert_binomial(got / DRAWS, share, DRAWS)


@given(
    shares=st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 1.0]), min_size=2, max_size=40),
    constant=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    width=st.sampled_from([1, 3, 8, 24]),
    seed=st.integers(0, 2**32),
)
def test_distinct_rows_follow_the_shares_of_any_number_of_replicas(
    shares: list[float], constant: bool, dtype: torch.dtype, width: int, seed: int
) -> None:
    """Also where the gate's weights are constant. A replica whose share is 0 gets nothing, if another one has any."""
    draws, generator = 4_000, torch.Generator().manual_seed(seed)
    names = [f"actor-{i:02d}" for i in range(len(shares))]
    table = layer_table(make_placement([dict(zip(names, shares, strict=True))], names), LAYER)
    # Few bits a column: width 1 in a short type has fewer distinct rows than draws, so float32 there.
    x_TD = torch.randn(draws, width, generator=generator).to(dtype if width > 1 else torch.float32)
    weights_TK = torch.ones(draws, 1) if constant else torch.rand(draws, 1, generator=generator)
    observed = fractions(table, x_TD, torch.zeros(draws, 1, dtype=torch.int64), weights_TK)
    total = sum(shares)
    for name, share in zip(names, shares, strict=True):
        expected = share / total if total else 1 / len(shares)
        assert_binomial(observed.get(name, 0.0), expected, draws)


@given(
    x=st.lists(st.floats(-8, 8, width=16), min_size=5, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    others=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)
def test_equal_rows_take_the_same_replica_in_any_batch(
    x: list[float], dtype: torch.dtype, others: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = [f"actor-{i}" for i in range(7)]
    table = layer_table(make_placement([dict.fromkeys(names, 1 / 7)], names), LAYER)
    row_D = torch.tensor(x).to(dtype)
    zeros_turned_D = torch.where(row_D == 0, -row_D, row_D)  # -0 equals 0
    noise_TD = torch.randn(others, 5, generator=generator).to(dtype)
    x_TD = torch.cat([noise_TD, row_D[None], noise_TD, zeros_turned_D[None]])
    ids_TK, weights_TK = torch.zeros(len(x_TD), 1, dtype=torch.int64), torch.ones(len(x_TD), 1)
    (alone,) = dispatch(table, row_D[None], ids_TK[:1], weights_TK[:1])
    parts = dispatch(table, x_TD, ids_TK, weights_TK)
    assert [part.actor for part in parts if others in part.rows_N] == [alone.actor]
    assert [part.actor for part in parts if len(x_TD) - 1 in part.rows_N] == [alone.actor]


def test_a_share_of_nothing_at_the_end_stays_nothing_however_the_others_round() -> None:
    shares = {f"actor-{i}": 0.1 for i in range(9)} | {"actor-9": 0.0}
    table = layer_table(make_placement([shares], list(shares)), LAYER)
    assert table.bound_ER[0, 8] == table.bound_ER[0, 9] == 1.0


def test_rows_are_not_looked_at_where_nothing_is_replicated() -> None:
    table = layer_table(make_placement([{"a": 1.0}, {"b": 1.0}], ["a", "b"]), LAYER)
    hidden = torch.empty(2, WIDTH, device="meta")  # any read of it raises
    parts = dispatch(table, hidden, torch.tensor([[0], [1]]), torch.ones(2, 1))
    assert [part.actor for part in parts] == ["a", "b"]


def test_two_experts_and_two_layers_split_the_same_tokens_independently() -> None:
    """Else a token's experts would all fall on the same replica, and the load of actors would be lumpy."""
    actors = ["a", "b"]
    placement = make_placement([{"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5}], actors)
    x_TD, weights_TK = drawn_tokens(torch.Generator().manual_seed(2), 2)
    ids_TK = torch.tensor([0, 1]).expand(DRAWS, 2).contiguous()
    first = dispatch(layer_table(placement, LAYER), x_TD, ids_TK, weights_TK)[0]
    experts_at_a = torch.bincount(first.pair_slots_P // 2, minlength=DRAWS)
    both_share = float((experts_at_a == 2).sum()) / DRAWS
    assert abs(both_share - 0.25) < 0.02


def with_layer(placement: Placement, layer: int) -> Placement:
    return Placement(
        term=1,
        generation=1,
        layer_experts={layer: placement.layer_experts[LAYER]},
        actors=placement.actors,
        replicas=tuple(
            Replica(expert=ExpertId(layer=layer, index=r.expert.index), actor=r.actor, share=r.share)
            for r in placement.replicas
        ),
    )


def test_layers_split_the_same_token_differently() -> None:
    placement = make_placement([{"a": 0.5, "b": 0.5}], ["a", "b"])
    x_TD, weights_TK = drawn_tokens(torch.Generator().manual_seed(3), 1)
    ids_TK = torch.zeros(DRAWS, 1, dtype=torch.int64)
    at_a = [
        set(dispatch(layer_table(with_layer(placement, layer), layer), x_TD, ids_TK, weights_TK)[0].rows_N.tolist())
        for layer in (0, 1)
    ]
    assert abs(len(at_a[0] & at_a[1]) / DRAWS - 0.25) < 0.02


def test_a_missing_expert_is_named_and_the_rest_of_the_layer_is_not() -> None:
    placement = make_placement([{"a": 1.0}, {}, {"b": 1.0}, {}], ["a", "b"])
    table = layer_table(placement, LAYER)
    x_TD, weights_TK = torch.randn(2, WIDTH), torch.full((2, 2), 0.5)
    with pytest.raises(NotHosted, match=rf"^layer {LAYER}: no replica of experts \[1, 3\]$"):
        dispatch(table, x_TD, torch.tensor([[3, 0], [1, 3]]), weights_TK)
    assert [part.actor for part in dispatch(table, x_TD, torch.tensor([[0, 2], [2, 0]]), weights_TK)] == ["a", "b"]


def test_a_replica_on_an_actor_that_the_placement_does_not_list_takes_nothing() -> None:
    placement = make_placement([{"a": 0.5, "gone": 0.5}], ["a"])
    batch = torch.randn(50, WIDTH), torch.zeros(50, 1, dtype=torch.int64), torch.rand(50, 1)
    (part,) = dispatch(layer_table(placement, LAYER), *batch)
    assert part.actor == "a" and part.every_row


def test_avoided_actors_leave_their_shares_to_the_others_in_proportion() -> None:
    placement = make_placement([{"a": 0.5, "b": 0.3, "c": 0.2}], ["a", "b", "c"])
    table = layer_table(placement, LAYER, avoid={"a"})
    assert table.actors == ("a", "b", "c")
    assert table.actor_of_ER.tolist() == [[1, 2]]
    assert table.bound_ER[0].tolist() == pytest.approx([0.6, 1.0])


def test_only_indices_beyond_the_last_expert_are_skipped() -> None:
    assert kept_slots(torch.tensor([[0, 4], [7, 3]]), 4).tolist() == [0, 3]
