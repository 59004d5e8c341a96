"""The one definition of balancedness: in [0, 1] for any cluster, and None without load."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecluster.placement.layout import Fleet, Floats, Layout, make_layout, without
from moecluster.placement.names import balancedness_L, layer_balancedness, mean_balancedness
from moecluster.placement.policy.interface import Observation, decision_of
from moecluster.types import ActorAddress, ExpertId, Placement, Replica


def fleet_of(*, slots: list[int], speeds: list[float] | None = None, layers: int = 1) -> Fleet:
    return Fleet(
        slots_A=np.array(slots),
        speed_A=np.array(speeds or [1.0] * len(slots)),
        node_A=np.arange(len(slots)),
        expert_bytes_L=np.ones(layers),
    )


def one_expert_an_actor(num_actors: int) -> Layout:
    numbers = np.arange(num_actors)
    return make_layout(np.array([num_actors]), np.zeros_like(numbers), numbers, numbers, np.ones(num_actors))


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Layout, Floats, Fleet]:
    """Any layers, experts and replicas, on actors of which some have no slots, no speed, or are dead; loads of any
    size, some of them zero; shares that need not sum to 1, as after a death."""
    num_layers, num_actors = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    num_experts_L = np.array(draw(st.lists(st.integers(1, 6), min_size=num_layers, max_size=num_layers)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    holds_LEA = rng.random((num_layers, num_experts_L.max(), num_actors)) < rng.random()
    holds_LEA &= (np.arange(num_experts_L.max()) < num_experts_L[:, None])[:, :, None]
    layer_R, expert_R, actor_R = np.nonzero(holds_LEA)
    layout = make_layout(num_experts_L, layer_R, expert_R, actor_R, rng.random(len(layer_R)))
    load_LE = rng.exponential(10.0 ** rng.integers(-9, 12), holds_LEA.shape[:2])
    load_LE *= rng.random(load_LE.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    fleet = Fleet(
        slots_A=rng.integers(0, 3, num_actors),
        speed_A=rng.exponential(1.0, num_actors) * (rng.random(num_actors) < 0.8),
        node_A=np.zeros(num_actors, dtype=np.int64),
        expert_bytes_L=np.ones(num_layers),
    )
    dead_A = rng.random(num_actors) < 0.2
    return without(layout, dead_A[layout.actor_R]), load_LE, fleet


@given(case=clusters())
def test_it_lies_between_0_and_1_and_is_missing_only_without_load(case: tuple[Layout, Floats, Fleet]) -> None:
    layout, load_LE, fleet = case
    of_L = balancedness_L(layout, load_LE, fleet)
    carried_L = np.zeros(layout.num_layers)
    np.add.at(carried_L, layout.layer_R, load_LE[layout.layer_R, layout.expert_R] * layout.share_R)
    np.testing.assert_array_equal(np.isnan(of_L), carried_L == 0)
    assert ((of_L >= 0) & (of_L <= 1))[carried_L > 0].all()
    mean = mean_balancedness(layout, load_LE, fleet)
    assert (mean is None) == (carried_L == 0).all() and (mean is None or 0 <= mean <= 1)


def test_an_actor_without_slots_that_still_carries_load_counts_in_the_mean_too() -> None:
    """A drained actor among three equal ones: this was 3 / 2."""
    layout, load_LE = one_expert_an_actor(3), np.ones((1, 3))
    assert balancedness_L(layout, load_LE, fleet_of(slots=[1, 1, 0])).tolist() == [1.0]
    emptied = without(layout, layout.actor_R == 2)
    assert balancedness_L(emptied, load_LE, fleet_of(slots=[1, 1, 0])).tolist() == [1.0]
    assert balancedness_L(emptied, load_LE, fleet_of(slots=[1, 1, 1])).tolist() == [pytest.approx(2 / 3)]


def test_loads_count_by_speed() -> None:
    layout, load_LE = one_expert_an_actor(2), np.array([[3.0, 1.0]])
    assert balancedness_L(layout, load_LE, fleet_of(slots=[1, 1]))[0] == pytest.approx(2 / 3)
    assert balancedness_L(layout, load_LE, fleet_of(slots=[1, 1], speeds=[3.0, 1.0]))[0] == pytest.approx(1.0)
    assert balancedness_L(layout, load_LE, fleet_of(slots=[1, 1], speeds=[1.0, 0.0]))[0] == 0.0
    assert math.isnan(balancedness_L(layout, 0 * load_LE, fleet_of(slots=[1, 1]))[0])


def test_the_mean_is_over_layers_with_load() -> None:
    expert_R = np.array([0, 1, 0, 1])
    layout = make_layout(np.array([2, 2]), np.array([0, 0, 1, 1]), expert_R, expert_R, np.ones(4))
    fleet = fleet_of(slots=[1, 1], layers=2)
    assert mean_balancedness(layout, np.array([[3.0, 1.0], [0.0, 0.0]]), fleet) == pytest.approx(2 / 3)
    assert mean_balancedness(layout, np.zeros((2, 2)), fleet) is None


def test_it_is_the_same_of_a_placement_as_of_a_layout() -> None:
    rng = np.random.default_rng(3)
    counts_E, shares_EA = rng.integers(0, 50, 5), rng.dirichlet(np.ones(3), 5)
    expert_R, actor_R = np.divmod(np.arange(15), 3)
    layout = make_layout(np.array([5]), np.zeros(15, dtype=np.int64), expert_R, actor_R, shares_EA.reshape(-1))
    placement = Placement(
        term=1,
        generation=1,
        layer_experts={7: 5},
        actors={name: ActorAddress(actor=name, address="h:1", incarnation=name) for name in "abc"},
        replicas=tuple(
            Replica(expert=ExpertId(layer=7, index=int(e)), actor="abc"[a], share=float(shares_EA[e, a]))
            for e, a in zip(expert_R, actor_R, strict=True)
        ),
    )
    found = layer_balancedness(placement, {ExpertId(layer=7, index=e): int(n) for e, n in enumerate(counts_E)})
    expected = balancedness_L(layout, counts_E[None].astype(float), fleet_of(slots=[5, 5, 5]))
    assert found == {7: pytest.approx(expected[0])}


def test_a_decision_on_a_load_that_nobody_counted_claims_no_balancedness() -> None:
    fleet, layout = fleet_of(slots=[1, 1]), one_expert_an_actor(2)
    seen = Observation(now_s=0.0, load_LE=np.ones((1, 2)), fleet=fleet, layout=layout, budget_bytes=1.0)
    assert decision_of(seen, seen.layout, "as it is").balancedness_before == 1.0
    guessed = decision_of(dataclasses.replace(seen, load_counted=False), seen.layout, "as it is")
    assert guessed.balancedness_before is None and guessed.balancedness_after is None
