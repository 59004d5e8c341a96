"""The simulator's queue against hand calculations: no tokens are lost, and time can be split anywhere."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecluster.placement.layout import make_layout
from moecluster.simulation.costs import Costs
from moecluster.simulation.fluid_queue import FluidQueue, Served, StepCosts, steady_batch, step_costs
from moecluster.simulation.layouts import uniform_fleet

COSTS = Costs(message_s=1e-3, expert_s=1e-4, row_s=1e-5, row_bytes=1000.0, link_bytes_per_s=1e9)


def one_actor(*, fixed_s: float = 0.1, per_token_s: float = 0.01) -> StepCosts:
    return StepCosts(base_s=0.0, fixed_LA=np.array([[fixed_s]]), per_token_LA=np.array([[per_token_s]]))


def test_the_steady_batch_is_where_arrivals_fill_a_step() -> None:
    costs = one_actor()
    tokens = steady_batch(costs, 50.0, 1e9)
    assert tokens == pytest.approx(10.0)  # a step of 10 takes 0.2 s, in which 10 come
    assert costs.step_s(tokens)[0] * 50.0 == pytest.approx(tokens)
    assert steady_batch(costs, 50.0, 4.0) == 4.0
    assert steady_batch(costs, 200.0, 1e9) == 1e9  # more than 100 a second are never served
    assert steady_batch(costs, 0.0, 1e9) == 0.0


@given(
    fixed=st.lists(st.lists(st.floats(0.0, 0.01), min_size=3, max_size=3), min_size=1, max_size=4),
    slopes=st.lists(st.lists(st.floats(0.0, 1e-3), min_size=3, max_size=3), min_size=4, max_size=4),
    rate=st.floats(1.0, 5000.0),
)
def test_a_steady_batch_is_steady_whatever_the_actors_cost(fixed, slopes, rate) -> None:
    costs = StepCosts(base_s=1e-3, fixed_LA=np.array(fixed), per_token_LA=np.array(slopes[: len(fixed)]))
    tokens = steady_batch(costs, rate, 1000.0)
    if tokens < 1000.0:
        assert tokens == pytest.approx(rate * costs.step_s(tokens)[0], rel=1e-6)
    else:
        assert rate * costs.step_s(1000.0)[0] >= 1000.0 * (1 - 1e-6)


def test_a_backlog_grows_and_drains_exactly() -> None:
    costs, queue = one_actor(), FluidQueue(most_tokens=10.0)  # 10 tokens in 0.2 s: 50 a second at most
    served = queue.advance(4.0, 60.0, 1.0, costs)
    assert [queue.backlog, served.tokens] == pytest.approx([40.0, 200.0])
    assert served.waited == pytest.approx(80.0)  # a triangle of 40 tokens by 4 s
    served = queue.advance(10.0, 40.0, 1.0, costs)  # drained after 4 s, then 6 s at 40 a second
    assert queue.backlog == 0.0
    assert served.tokens == pytest.approx(4 * 50 + 6 * 40)
    assert served.waited == pytest.approx(80.0)
    steady_step_s = 0.1 / (1 - 40 * 0.01)
    assert served.step_seconds == pytest.approx(200 * 0.2 + 240 * steady_step_s)


def test_tokens_that_need_a_lost_expert_are_held_and_served_later() -> None:
    costs, queue = one_actor(), FluidQueue(most_tokens=1000.0)
    served = queue.advance(2.0, 50.0, 0.6, costs)
    assert [queue.held, served.tokens] == pytest.approx([40.0, 60.0])
    assert served.waited == pytest.approx(40.0)
    assert queue.held == pytest.approx(40.0)
    served = queue.advance(2.0, 50.0, 1.0, costs)
    assert (queue.held, queue.backlog) == (0.0, 0.0)
    assert served.tokens == pytest.approx(140.0)


@given(
    parts=st.lists(
        st.tuples(st.floats(0.01, 50.0), st.floats(0.0, 200.0), st.sampled_from([0.0, 0.5, 1.0])),
        min_size=1,
        max_size=20,
    ),
    cut=st.floats(0.1, 0.9),
)
def test_no_token_is_lost_and_cutting_time_changes_nothing(parts, cut) -> None:
    costs, whole, halves = one_actor(), FluidQueue(10.0), FluidQueue(10.0)
    came, served, in_parts = 0.0, Served(), Served()
    for seconds, rate, available in parts:
        came += seconds * rate
        served += whole.advance(seconds, rate, available, costs)
        in_parts += halves.advance(cut * seconds, rate, available, costs)
        in_parts += halves.advance((1 - cut) * seconds, rate, available, costs)
    assert served.tokens + whole.backlog + whole.held == pytest.approx(came, rel=1e-6, abs=1e-6)
    assert (in_parts.tokens, in_parts.waited) == pytest.approx((served.tokens, served.waited), rel=1e-6, abs=1e-6)
    assert (halves.backlog, halves.held) == pytest.approx((whole.backlog, whole.held), rel=1e-6, abs=1e-6)


def test_a_layer_takes_as_long_as_its_slowest_actor() -> None:
    fleet = dataclasses.replace(uniform_fleet(2, 2, np.ones(1)), speed_A=np.array([1.0, 2.0]))
    layout = make_layout(
        np.array([3]),
        np.zeros(4, np.int64),
        np.array([0, 0, 1, 2]),
        np.array([0, 1, 1, 0]),
        np.array([0.25, 0.75, 1, 1]),
    )
    pairs_LE = np.array([[0.8, 0.7, 0.5]])
    found = step_costs(layout, pairs_LE, fleet, np.array([1e9, 0.5e9]), COSTS)
    np.testing.assert_allclose(found.fixed_LA, [[2e-4, 1e-4]])
    np.testing.assert_allclose(found.per_token_LA, [[0.7 * (1e-5 + 1e-6), 1.3 * (0.5e-5 + 2e-6)]])
    assert found.step_s(1000.0)[0] == pytest.approx(1e-3 + 1e-4 + 1.3 * 7e-3)
    assert found.step_s(1.0)[0] == pytest.approx(1e-3 + 2e-4 + 0.7 * 1.1e-5)
