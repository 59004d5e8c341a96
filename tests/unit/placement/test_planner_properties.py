"""Properties of every policy, for random clusters, loads and failures from hypothesis."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecluster.errors import ConfigError, ResourceError
from moecluster.placement.layout import Fleet, Floats, Layout, added_R, make_layout, without
from moecluster.placement.names import balancedness_L
from moecluster.placement.plan.restore import restored
from moecluster.placement.policy.interface import USUAL_BURST, Observation
from moecluster.placement.policy.registry import POLICIES, policy_named
from tests.support.known import known
from tests.unit.placement.planner_cases import Case, cases, random_load, shares_per_expert

UNLIMITED_BYTES = np.inf
MOST_DECISIONS = 60  # within which a policy must converge under a constant load


def observe(case: Case, *, layout: Layout | None = None, budget_bytes: float = UNLIMITED_BYTES, now_s: float = 0.0):
    """Uses burst 3, the clusters' default: all properties must hold with a borrowed budget."""
    return Observation(
        now_s=now_s,
        load_LE=case.load_LE,
        fleet=case.fleet,
        layout=case.layout if layout is None else layout,
        budget_bytes=budget_bytes,
        burst=USUAL_BURST,
    )


def assert_valid(layout: Layout, fleet: Fleet) -> None:
    """No actor exceeds its slots, no expert is twice on one actor, every expert has a replica, shares sum to 1."""
    key_R = layout.layer_R * fleet.num_actors + layout.actor_R
    held_LA = np.bincount(key_R, minlength=layout.num_layers * fleet.num_actors).reshape(layout.num_layers, -1)
    assert (held_LA <= fleet.slots_A).all()
    places = set(zip(layout.layer_R.tolist(), layout.expert_R.tolist(), layout.actor_R.tolist(), strict=True))
    assert len(places) == layout.num_replicas
    current = {(layer, expert) for layer, expert, _ in places}
    assert current == {(i, e) for i, count in enumerate(layout.num_experts_L.tolist()) for e in range(count)}
    assert (layout.share_R >= 0).all()
    np.testing.assert_allclose(shares_per_expert(layout), 1.0, rtol=1e-9)


def fail(case: Case, rng: np.random.Generator) -> Case:
    """Some actors lose all their experts, others are drained; the rest still has room for every expert."""
    num_actors = case.fleet.num_actors
    dead_A, drained_A = rng.random(num_actors) < 0.3, rng.random(num_actors) < 0.3
    slots_A = np.where(drained_A, 0, case.fleet.slots_A)
    slots_A[0] += max(case.layout.max_experts - int(slots_A.sum()), 0)
    fleet = Fleet(
        slots_A=slots_A,
        speed_A=case.fleet.speed_A,
        node_A=case.fleet.node_A,
        expert_bytes_L=case.fleet.expert_bytes_L,
    )
    return Case(layout=without(case.layout, dead_A[case.layout.actor_R]), load_LE=case.load_LE, fleet=fleet)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_a_decision_is_valid_whatever_failed(name: str, case: Case, seed: int):
    case = fail(case, np.random.default_rng(seed))
    policy = policy_named(name)
    decision, _ = policy.decide(observe(case), policy.first_state())
    assert_valid(decision.layout, case.fleet)
    assert 0 < known(decision.balancedness_after) <= 1 if case.load_LE.any() else decision.balancedness_after is None


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("chance", [0.3, 0.9, 1.0])
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_cold_experts_get_no_replica_and_the_others_keep_theirs(name: str, chance: float, case: Case, seed: int):
    """Also if a whole layer is cold, or all layers."""
    cold_LE = np.random.default_rng(seed).random(case.load_LE.shape) < chance
    seen = observe(case, layout=without(case.layout, cold_LE.reshape(-1)[case.layout.expert_key_R]))
    seen = replace(seen, cold_LE=cold_LE, load_LE=np.where(cold_LE, 0.0, seen.load_LE))
    policy = policy_named(name)
    decision, _ = policy.decide(seen, policy.first_state())
    current = np.bincount(decision.layout.expert_key_R, minlength=cold_LE.size) > 0
    there = np.arange(cold_LE.shape[1]) < case.layout.num_experts_L[:, None]
    np.testing.assert_array_equal(current.reshape(cold_LE.shape), there & ~cold_LE)


BUDGETS_BYTES, BURSTS = st.sampled_from([0.0, 1.0, 3.0, 10.0]), st.sampled_from([0.0, 0.5, USUAL_BURST])


def optional_bytes(case: Case, after: Layout) -> float:
    """The bytes that a decision loads in addition to lost experts."""
    added = added_R(restored(case.layout, case.load_LE, case.fleet), after)
    return float(case.fleet.expert_bytes_L[after.layer_R[added]].sum())


@given(case=cases(), seed=st.integers(0, 2**32 - 1), budget_bytes=BUDGETS_BYTES, burst=BURSTS)
def test_only_what_is_lost_goes_beyond_the_budget(case: Case, seed: int, budget_bytes: float, burst: float):
    case = fail(case, np.random.default_rng(seed))
    policy = policy_named("share")
    seen = replace(observe(case, budget_bytes=budget_bytes), burst=burst)
    decision, _ = policy.decide(seen, policy.first_state())
    assert optional_bytes(case, decision.layout) <= budget_bytes * (1 + burst)


@given(case=cases(), seed=st.integers(0, 2**32 - 1), budget_bytes=BUDGETS_BYTES, burst=BURSTS)
def test_what_is_borrowed_is_paid_back(case: Case, seed: int, budget_bytes: float, burst: float):
    """The load differs at every decision, so that there is always something to move."""
    rng, policy = np.random.default_rng(seed), policy_named("share")
    state, loaded_bytes = policy.first_state(), 0.0
    for step in range(1, 9):
        case = replace(case, load_LE=random_load(rng, case.layout.num_experts_L, steepness=1.5))
        seen = replace(observe(case, budget_bytes=budget_bytes, now_s=60.0 * step), burst=burst)
        decision, state = policy.decide(seen, state)
        loaded_bytes += optional_bytes(case, decision.layout)
        assert loaded_bytes <= budget_bytes * (step + burst)
        case = replace(case, layout=decision.layout)


@given(case=cases())
def test_a_plan_applied_to_a_plan_comes_to_rest(case: Case):
    policy = policy_named("share")
    layout, state = case.layout, policy.first_state()
    for step in range(MOST_DECISIONS):
        decision, state = policy.decide(observe(case, layout=layout, now_s=60.0 * step), state)
        if decision.layout is layout:
            break
        layout = decision.layout
    else:
        pytest.fail("still moving")
    again, _ = policy.decide(observe(case, layout=layout, now_s=60.0 * MOST_DECISIONS), state)
    assert again.layout is layout
    assert again.moved_bytes == 0


@given(case=cases())
def test_share_makes_no_layer_worse(case: Case):
    policy = policy_named("share")
    decision, _ = policy.decide(observe(case), policy.first_state())
    before_L = balancedness_L(case.layout, case.load_LE, case.fleet)
    after_L = balancedness_L(decision.layout, case.load_LE, case.fleet)
    assert not (after_L < before_L * (1 - 0.002)).any()  # NaN: a layer without load


@given(case=cases())
def test_without_a_budget_only_shares_change(case: Case):
    for name in sorted(POLICIES):
        policy = policy_named(name)
        decision, _ = policy.decide(observe(case, budget_bytes=0.0), policy.first_state())
        assert decision.moved_bytes == 0
        assert decision.layout.actor_R.tolist() == case.layout.actor_R.tolist()
        assert decision.layout.expert_R.tolist() == case.layout.expert_R.tolist()


@given(case=cases())
def test_static_lets_be_what_stands(case: Case):
    policy = policy_named("static")
    decision, _ = policy.decide(observe(case), policy.first_state())
    assert decision.layout is case.layout


@given(case=cases(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_the_unit_of_load_does_not_matter(case: Case, seed: int):
    scaled = Case(layout=case.layout, load_LE=case.load_LE * 2.0**10, fleet=case.fleet)
    policy = policy_named("share")
    one, _ = policy.decide(observe(case), policy.first_state())
    other, _ = policy.decide(observe(scaled), policy.first_state())
    assert one.layout.actor_R.tolist() == other.layout.actor_R.tolist()
    np.testing.assert_allclose(one.layout.share_R, other.layout.share_R, atol=1e-6)


def small_case(slots: int, load: Floats) -> Case:
    fleet = Fleet(
        slots_A=np.array([slots, slots]),
        speed_A=np.ones(2),
        node_A=np.arange(2),
        expert_bytes_L=np.ones(1),
    )
    count = load.shape[1]
    layout = Layout(
        num_experts_L=np.array([count]),
        layer_R=np.zeros(count, dtype=np.int64),
        expert_R=np.arange(count),
        actor_R=np.arange(count) * 2 // count,
        share_R=np.ones(count),
    )
    return Case(layout=layout, load_LE=load, fleet=fleet)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_too_few_slots_are_counted(name: str):
    policy = policy_named(name)
    case = small_case(2, np.ones((1, 8)))
    with pytest.raises(ResourceError, match=r"4 slots for each layer.*8 experts: 4 slots are missing"):
        policy.decide(observe(case), policy.first_state())


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_budget_below_nought_is_refused(name: str):
    policy = policy_named(name)
    with pytest.raises(ConfigError, match="move_budget_bytes: got -1"):
        policy.decide(observe(small_case(4, np.ones((1, 8))), budget_bytes=-1), policy.first_state())


def test_an_unknown_policy_suggests_a_known_one():
    with pytest.raises(ConfigError, match=r'got "shares", no such policy; did you mean share\?'):
        policy_named("shares")


def test_without_a_limit_of_bytes_what_pays_is_moved():
    zeros_R = np.zeros(4, dtype=np.int64)
    layout = make_layout(np.array([4]), zeros_R, np.arange(4), zeros_R, np.ones(4))
    fleet = Fleet(
        slots_A=np.array([4, 4]), speed_A=np.ones(2), node_A=np.array([0, 1]), expert_bytes_L=np.array([1000.0])
    )
    case = Case(layout=layout, load_LE=np.array([[9.0, 8.0, 7.0, 6.0]]), fleet=fleet)
    policy = policy_named("share")
    decision, _ = policy.decide(observe(case, budget_bytes=np.inf), policy.first_state())
    assert balancedness_L(decision.layout, case.load_LE, fleet)[0] > 0.99
