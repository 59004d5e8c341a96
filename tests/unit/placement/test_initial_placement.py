import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecluster.errors import ConfigError
from moecluster.placement.initial import contiguous_placement, given_placement, initial_placement
from moecluster.types import ExpertId

ACTORS = [f"expert-{i}" for i in range(4)]


def expert(layer: int, index: int) -> ExpertId:
    return ExpertId(layer=layer, index=index)


@given(st.dictionaries(st.integers(0, 9), st.integers(1, 70), min_size=1, max_size=4), st.integers(1, 20))
def test_contiguous_is_whole_even_and_in_order(num_experts: dict[int, int], num_actors: int) -> None:
    actors = [f"expert-{i}" for i in range(num_actors)]
    replicas = contiguous_placement(num_experts, actors)
    assert [r.expert for r in replicas] == [expert(la, e) for la in sorted(num_experts) for e in range(num_experts[la])]
    assert all(r.share == 1.0 for r in replicas)
    for layer, count in num_experts.items():
        ranks = [actors.index(r.actor) for r in replicas if r.expert.layer == layer]
        assert ranks == sorted(ranks)
        held = [ranks.count(a) for a in range(num_actors)]
        assert max(held) - min(held) <= 1
        assert sum(held) == count


def test_as_many_actors_as_experts_gives_each_actor_one_index_of_every_layer() -> None:
    replicas = contiguous_placement({1: 4, 3: 4}, ACTORS)
    assert {(r.expert.index, r.actor) for r in replicas} == {(i, f"expert-{i}") for i in range(4)}


def test_a_table_places_experts_and_shares_replicas_evenly() -> None:
    table = {"expert-0": ["0/*"], "expert-1": ["*/1", "2/0"]}
    replicas = given_placement(table, {0: 2, 2: 2}, ACTORS)
    assert [(str(r.expert), r.actor, r.share) for r in replicas] == [
        ("0/0", "expert-0", 1.0),
        ("0/1", "expert-0", 0.5),
        ("0/1", "expert-1", 0.5),
        ("2/0", "expert-1", 1.0),
        ("2/1", "expert-1", 1.0),
    ]


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"expert-9": ["*/*"]}, r"placement\.expert-9: no such expert actor; there are expert-0 to expert-3"),
        ({"expert-0": ["0-1"]}, r'got "0-1", expected layer/index'),
        ({"expert-0": ["1/0"]}, r"layer 1 has no experts; MoE layers are 0, 2"),
        ({"expert-0": ["2/2"]}, r"layer 2 has experts 0 to 1"),
        ({"expert-0": ["*/*", "0/1"]}, r"expert 0/1 is named twice"),
        ({"expert-0": ["0/*", "2/0"]}, r"1 experts are on no actor \(2/1\)"),
        ({}, r"4 experts are on no actor \(0/0, 0/1, 2/0, 2/1\)"),
    ],
)
def test_a_wrong_table_is_one_line_that_says_what_would_be_right(table: dict[str, list[str]], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        given_placement(table, {0: 2, 2: 2}, ACTORS)
    assert "\n" not in str(caught.value)


def test_the_setting_chooses() -> None:
    assert initial_placement("contiguous", {0: 4}, ACTORS) == contiguous_placement({0: 4}, ACTORS)
    assert initial_placement({"expert-2": ["*/*"]}, {0: 1}, ACTORS)[0].actor == "expert-2"
