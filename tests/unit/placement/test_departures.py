from hypothesis import given
from hypothesis import strategies as st

from moecluster.placement.departures import choose_leaving

NAMES = tuple(f"expert-{i}" for i in range(12))


def chosen(count: int, shared: tuple[str, ...] = (), **nodes: str) -> list[str]:
    """nodes: numbers of actors by node, as a="0 3"."""
    where = {f"expert-{number}": node for node, numbers in nodes.items() for number in numbers.split()}
    return list(choose_leaving(tuple(where), count, nodes=where, shared_nodes=shared))


def test_the_node_with_the_fewest_actors_becomes_free_not_that_of_the_highest_number() -> None:
    assert chosen(1, a="0 3", b="1", c="2 4") == ["expert-1"]
    assert chosen(3, a="0 3", b="1", c="2 4") == ["expert-1", "expert-2", "expert-4"]


def test_of_equal_nodes_the_one_of_the_highest_number_goes() -> None:
    assert chosen(2, a="0 5", b="1 4", c="2 3") == ["expert-0", "expert-5"]
    assert chosen(2, a="0", b="10", c="9") == ["expert-9", "expert-10"], "by number, not by letters"


def test_a_node_that_holds_other_processes_is_emptied_last() -> None:
    assert chosen(2, ("head",), head="4", b="0 1", c="2 3") == ["expert-2", "expert-3"]
    assert chosen(3, ("head",), head="4", b="0 1") == ["expert-0", "expert-1", "expert-4"]


def test_without_a_node_that_can_be_emptied_the_highest_numbers_of_the_smallest_go() -> None:
    assert chosen(1, a="0 1 2", b="3 4") == ["expert-4"]


def test_an_actor_whose_node_is_not_known_stands_for_itself() -> None:
    assert choose_leaving(("expert-0", "expert-1"), 1, nodes={"expert-0": "a"}) == ("expert-1",)


@given(
    nodes=st.dictionaries(st.sampled_from(NAMES), st.sampled_from("abcd")),
    shared=st.sets(st.sampled_from("abcd")),
    count=st.integers(0, 14),
)
def test_exactly_as_many_leave_as_asked_and_no_unshared_node_could_have_been_freed_instead_of_a_part(
    nodes: dict[str, str], shared: set[str], count: int
) -> None:
    left = choose_leaving(tuple(nodes), count, nodes=nodes, shared_nodes=shared)
    assert len(set(left)) == len(left) == min(count, len(nodes)) and set(left) <= nodes.keys()
    parts = {nodes[a] for a in left} - {n for n in nodes.values() if all(a in left for a in nodes if nodes[a] == n)}
    assert len(parts) <= 1, "at most one node is emptied by half"
