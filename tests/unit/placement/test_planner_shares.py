"""Shares that minimize the maximum load: against an LP solver, and properties for any layout."""

import numpy as np
import pytest
from hypothesis import given
from scipy.optimize import linprog

from moecluster.placement.layout import Fleet, Floats, Layout, actor_load_LA, with_shares
from moecluster.placement.plan.shares import least_max_shares
from tests.unit.placement.planner_cases import Case, cases, shares_per_expert


def best_by_linear_program(layout: Layout, load_LE: Floats, fleet: Fleet, layer: int) -> float:
    """The minimal max(load / speed) of one layer, found by HiGHS."""
    expert_R, actor_R = layout.expert_R[layout.layer_R == layer], layout.actor_R[layout.layer_R == layer]
    num_replicas = len(expert_R)
    sums = np.zeros((layout.num_experts_L[layer], num_replicas + 1))
    sums[expert_R, np.arange(num_replicas)] = 1
    below = np.zeros((fleet.num_actors, num_replicas + 1))
    below[actor_R, np.arange(num_replicas)] = load_LE[layer, expert_R]
    below[:, -1] = -fleet.speed_A
    cost = np.zeros(num_replicas + 1)
    cost[-1] = 1
    solved = linprog(cost, A_ub=below, b_ub=np.zeros(fleet.num_actors), A_eq=sums, b_eq=np.ones(len(sums)))
    assert solved.success and solved.fun is not None
    return float(solved.fun)


@given(cases())
def test_no_shares_are_better(case: Case):
    found = least_max_shares(case.layout, case.load_LE, case.fleet)
    for layer in range(case.layout.num_layers):
        best = best_by_linear_program(case.layout, case.load_LE, case.fleet, layer)
        assert found.load_LA[layer].max() == pytest.approx(best, rel=1e-7, abs=1e-9)  # HiGHS's own tolerance


@given(cases())
def test_the_answer_proves_itself(case: Case):
    found = least_max_shares(case.layout, case.load_LE, case.fleet)
    assert (found.load_LA.max(axis=1) <= found.bound_L * (1 + 1e-9)).all()
    loads_LA = actor_load_LA(with_shares(case.layout, found.share_R), case.load_LE, case.fleet)
    np.testing.assert_allclose(found.load_LA, loads_LA, rtol=1e-12, atol=1e-12)


@given(cases())
def test_shares_are_shares(case: Case):
    found = least_max_shares(case.layout, case.load_LE, case.fleet)
    assert (found.share_R >= 0).all() and (found.share_R <= 1 + 1e-12).all()
    np.testing.assert_allclose(shares_per_expert(with_shares(case.layout, found.share_R)), 1.0, rtol=1e-12)


@given(cases())
def test_optimal_shares_stand(case: Case):
    once = with_shares(case.layout, least_max_shares(case.layout, case.load_LE, case.fleet).share_R)
    twice = least_max_shares(once, case.load_LE, case.fleet)
    np.testing.assert_allclose(once.share_R, twice.share_R, atol=1e-6)
