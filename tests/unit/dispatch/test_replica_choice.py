"""An expert's tokens are split over its replicas by share, depending only on the token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moecluster.dispatch.permute import dispatch
from moecluster.dispatch.replica_choice import LayerTable, layer_table
from moecluster.errors import NotHosted
from moecluster.types import ExpertId, Placement, Replica
from tests.unit.dispatch.layer_placement import LAYER, WIDTH, expert_of_pairs, make_placement

DRAWS = 20_000


def drawn_tokens(generator: torch.Generator, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x_TD, and equal weights_TK, as from a hash gate or a renormalized top-1: only rows tell tokens apart."""
    return torch.randn(DRAWS, WIDTH, generator=generator), torch.full((DRAWS, top_k), 1 / top_k)


def fractions(
    table: LayerTable, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> dict[str, float]:
    """Actor -> its fraction of the assignments."""
    parts = dispatch(table, x_TD, ids_TK, weights_TK)
    return {part.actor: len(part.pair_slots_P) / ids_TK.numel() for part in parts}


def assert_binomial(observed: float, share: float, draws: int) -> None:
    """Asserts that a count of `draws` with probability `share` is within five standard deviations."""
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
    """Also if the gate's weights are constant. A replica with share 0 gets nothing if another one has a positive
    share."""
    draws, generator = 4_000, torch.Generator().manual_seed(seed)
    names = [f"actor-{i:02d}" for i in range(len(shares))]
    table = layer_table(make_placement([dict(zip(names, shares, strict=True))], names), LAYER)
    # Width 1 in a 16-bit dtype has fewer distinct rows than draws, so it uses float32.
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
    """Otherwise all of a token's experts would choose the same replica index, and actor loads would be uneven."""
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
