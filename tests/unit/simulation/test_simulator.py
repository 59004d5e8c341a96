"""The simulator: copies and deaths at exact times, any policy, and how its running time grows."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from moecluster.errors import ConfigError, ResourceError
from moecluster.placement.layout import Layout, make_layout
from moecluster.placement.policy.interface import Decision, Observation, decision_of
from moecluster.placement.policy.registry import POLICIES, policy_named
from moecluster.simulation.costs import Costs
from moecluster.simulation.fluid_queue import step_costs
from moecluster.simulation.layouts import contiguous_layout, uniform_fleet, usual_budget_bytes
from moecluster.simulation.scaling_law import fit_power_law, measure_sizes, sizes_around
from moecluster.simulation.scenario import Scenario, SimulatedWindow, balanced_tokens_per_s, summarize
from moecluster.simulation.simulator import Simulator
from moecluster.simulation.synthetic_load import LoadShape, SyntheticLoads
from moecluster.simulation.transfers import STORE, schedule
from tests.support.fakes.proportional_policy import ProportionalPolicy
from tests.support.known import known

COSTS = Costs(message_s=1e-3, expert_s=1e-4, row_s=1e-5, row_bytes=1000.0, link_bytes_per_s=1e9)
LAYERS, EXPERTS, ACTORS = 3, 16, 8


# Copies


def layout_of(*replicas: tuple[int, int, int]) -> Layout:
    layer, expert, actor = np.array(replicas, dtype=np.int64).T
    return make_layout(np.array([3, 3]), layer, expert, actor, np.ones(len(replicas)))


def test_copies_take_turns_on_links_and_lost_experts_come_first() -> None:
    fleet = uniform_fleet(4, 3, np.array([100.0, 200.0]))
    before = layout_of((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1))
    after = layout_of((0, 0, 0), (0, 0, 2), (0, 1, 0), (0, 1, 3), (1, 0, 0), (1, 0, 2), (1, 2, 3))
    found = schedule(before, after, fleet, 10.0, 100.0)
    assert [(t.layer, t.source, t.target, t.start_s, t.end_s) for t in found] == [
        (1, STORE, 3, 10.0, 12.0),
        (0, 0, 2, 10.0, 11.0),
        (0, 0, 3, 12.0, 13.0),
        (1, 1, 2, 11.0, 13.0),
    ]


def test_what_has_arrived_is_sent_on() -> None:
    fleet = uniform_fleet(8, 3, np.array([100.0, 100.0]))
    everywhere = layout_of(*((0, 0, actor) for actor in range(8)))
    found = schedule(layout_of((0, 0, 0)), everywhere, fleet, 0.0, 100.0)
    assert sorted(transfer.end_s for transfer in found) == [1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0]


# Whole days


@dataclass(frozen=True)
class Still:
    """A policy that never changes anything."""

    name: str = "still"

    def first_state(self) -> None: ...

    def decide(self, seen: Observation, state: None) -> tuple[Decision, None]:
        return decision_of(seen, seen.layout, "as it is"), None


def scenario(**changes) -> Scenario:
    quiet = Scenario(budget_bytes=1e9, actor_mtbf_hours=1e9, most_tokens_per_actor=64.0, window_s=60.0)
    return dataclasses.replace(quiet, **changes)


def simulated(
    policy, what: Scenario, *, num_windows: int = 60, slots: int = 4, part: float = 0.4, costs: Costs = COSTS, **shape
) -> list[SimulatedWindow]:
    fleet = uniform_fleet(ACTORS, slots, np.full(LAYERS, 1e6), actors_per_node=2)
    rate = part * balanced_tokens_per_s(fleet, LAYERS, 2, COSTS, what)
    load = LoadShape(num_layers=LAYERS, num_experts=EXPERTS, top_k=2, tokens_per_s=rate, **shape)
    loads = SyntheticLoads(load, window_s=what.window_s, num_windows=num_windows, seed=1)
    ticks = itertools.count()
    simulator = Simulator(what, fleet, loads, policy, costs, clock=lambda: next(ticks) * 0.5)
    return list(simulator.run())


def came(windows: list[SimulatedWindow]) -> float:
    return sum(window.tokens_per_s for window in windows)


def test_equal_seeds_give_equal_days() -> None:
    what = scenario(actor_mtbf_hours=2.0)
    first, again = (simulated(ProportionalPolicy(), what) for _ in range(2))
    assert first == again
    assert simulated(ProportionalPolicy(), dataclasses.replace(what, seed=1)) != first


def test_topics_change_at_once_in_the_stated_part_of_the_layers_and_at_the_stated_times() -> None:
    still: dict[str, Any] = {"drift": 0.0, "bursts_per_hour": 0.0, "swing": 0.0}
    shape = LoadShape(num_layers=10, num_experts=16, top_k=2, tokens_per_s=1e3, shift_every_s=180.0, **still)
    windows = [load.popularity_LE for load in SyntheticLoads(shape, window_s=60.0, num_windows=9, seed=3)]
    changed = [int((now != then).any(axis=1).sum()) for then, now in itertools.pairwise(windows)]
    assert changed == [0, 3, 0, 0, 3, 0, 0, 3]  # those at 180, 360 and 540 s
    for then, now in itertools.pairwise(windows):
        np.testing.assert_allclose(np.sort(now), np.sort(then))  # other experts, with the same popularities


def test_a_policy_that_follows_the_load_serves_what_one_that_does_not_cannot() -> None:
    wild: dict[str, Any] = {"part": 0.75, "swing": 0.0, "zipf": 1.2, "drift": 1.5, "drift_time_s": 1800.0}
    still, follows = (simulated(policy, scenario(), **wild) for policy in (Still(), ProportionalPolicy()))
    assert sum(w.served_per_s for w in follows) > 1.05 * sum(w.served_per_s for w in still)
    assert known(summarize(follows).mean_balancedness) > 1.2 * known(summarize(still).mean_balancedness)
    assert known(still[-1].wait_s) > 60 > known(follows[-1].wait_s) == 0
    assert summarize(follows).served == pytest.approx(summarize(follows).tokens, rel=1e-3)


def test_decisions_come_with_the_first_window_and_then_by_the_period() -> None:
    windows = simulated(ProportionalPolicy(), scenario(decide_every=4), num_windows=13)
    decisions = [decision for window in windows for decision in window.decisions]
    assert [decision.time_s for decision in decisions] == [60.0, 240.0, 480.0, 720.0]
    assert {(d.cause, d.decide_s, d.observe_s) for d in decisions} == {("period", 0.5, 0.5)}
    first = decisions[0]
    # A link carries one copy at a time, at a quarter of 1 GB/s: 4 slots x 3 layers of 4 ms each follow one another.
    assert 0.012 <= first.apply_s <= 0.2
    assert windows[0].moved_bytes == first.moved_bytes >= LAYERS * EXPERTS * 1e6
    assert (windows[0].replicas, windows[1].replicas) == (LAYERS * EXPERTS, LAYERS * ACTORS * 4)


def test_nobody_comes_before_the_first_plan_stands() -> None:
    slow = dataclasses.replace(COSTS, link_bytes_per_s=5e5)
    windows = simulated(ProportionalPolicy(), scenario(), num_windows=12, costs=slow)
    stands_s = 60.0 + windows[0].decisions[0].apply_s
    assert 120.0 < stands_s < 660.0
    for window in windows:
        opened_for_s = min(max(window.time_s - stands_s, 0.0), 60.0)
        assert (window.tokens_per_s > 0) == (opened_for_s > 0)
    with pytest.raises(ConfigError, match="only 120 s are simulated; simulate more hours"):
        summarize(windows[:2])


def test_a_lost_expert_costs_availability_exactly_until_it_stands_again() -> None:
    what = scenario(actor_mtbf_hours=3.0, whole_node_part=0.0, seed=2, detect_s=2.0, restart_s=20.0)
    windows = simulated(ProportionalPolicy(least=0.0), what, slots=4, part=0.1)
    hit = [window for window in windows if window.deaths]
    assert hit, "the seed has a death"
    window = hit[0]
    causes = [decision.cause for decision in window.decisions]
    assert causes[0] == "death"
    assert window.availability < 1.0
    recovery = window.decisions[0]
    assert recovery.apply_s < 1.0
    part_lost = 1.0 - window.availability
    assert part_lost <= (2.0 + recovery.apply_s) / 60.0
    others = [w for w in windows if not w.deaths and w.actors == ACTORS]
    assert all(w.availability == 1.0 for w in others)
    assert sum(w.served_per_s for w in windows) == pytest.approx(came(windows), rel=1e-9)


def test_without_room_for_a_lost_expert_it_waits_for_its_actor() -> None:
    what = scenario(actor_mtbf_hours=4.0, whole_node_part=0.0, seed=2, detect_s=1.0, restart_s=30.0)
    windows = simulated(policy_named("static"), what, slots=2, part=0.1)
    decisions = [decision for window in windows for decision in window.decisions]
    assert sum(window.deaths for window in windows) > 0
    assert {decision.cause for decision in decisions} <= {"period", "return"}
    assert windows[-1].replicas == LAYERS * EXPERTS
    assert min(window.availability for window in windows) < 0.8
    assert sum(w.served_per_s for w in windows) == pytest.approx(came(windows), rel=1e-6)


def test_a_node_takes_all_its_actors_along() -> None:
    windows = simulated(Still(), scenario(actor_mtbf_hours=3.0, whole_node_part=1.0, seed=2), slots=16)
    assert {window.deaths % 2 for window in windows} == {0}
    assert sum(window.deaths for window in windows) > 0


def test_fewer_slots_than_experts_are_refused() -> None:
    with pytest.raises(ResourceError, match="8 slots"):
        simulated(Still(), scenario(), slots=1)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_can_be_simulated(name) -> None:
    windows = simulated(policy_named(name), scenario(actor_mtbf_hours=20.0), num_windows=30)
    summary = summarize(windows)
    assert summary.windows == 30 and summary.decisions >= 7
    assert 0 < known(summary.mean_balancedness) <= 1
    assert windows[-1].replicas >= LAYERS * EXPERTS


# Growth


def test_a_power_law_is_found_and_says_where_time_runs_out() -> None:
    law = fit_power_law([10, 100, 1000], [2e-3, 2e-2, 2e-1])
    assert law.exponent == pytest.approx(1.0)
    assert law.size_at(1.0) == pytest.approx(5000.0)
    assert fit_power_law([10, 100], [1e-3, 1.001e-3]).size_at(300.0) == float("inf")
    assert fit_power_law([10, 100], [2.0, 1.0]).size_at(4.0) == float("inf")


def test_sizes_lie_around_the_one_asked_for() -> None:
    assert sizes_around(1000, 256) == [256, 508, 1008, 2000]
    assert sizes_around(4, 3) == [3, 4, 6, 8]


def test_measured_sizes_tell_what_the_policy_cost() -> None:
    what = scenario()
    load = LoadShape(num_layers=LAYERS, num_experts=EXPERTS, top_k=2, tokens_per_s=100.0)
    ticks = itertools.count()
    found = list(
        measure_sizes(
            [8, 16],
            lambda actors: uniform_fleet(actors, 4, np.full(LAYERS, 1e6)),
            load,
            ProportionalPolicy,
            what,
            COSTS,
            num_decisions=3,
            clock=lambda: next(ticks) * 0.5,
        )
    )
    assert [size.actors for size in found] == [8, 16]
    assert [size.replicas for size in found] == [8 * 4 * LAYERS, 16 * 4 * LAYERS]
    assert {size.decide_s for size in found} | {size.cold_decide_s for size in found} == {0.5}


def test_a_contiguous_start_and_the_balanced_rate() -> None:
    fleet = uniform_fleet(ACTORS, 2, np.full(LAYERS, 1e6))
    layout = contiguous_layout(np.full(LAYERS, EXPERTS), fleet)
    what = scenario()
    rate = balanced_tokens_per_s(fleet, LAYERS, 2, COSTS, what)
    even_LE = np.full((LAYERS, EXPERTS), 2 / EXPERTS)
    costs = step_costs(layout, even_LE, fleet, np.full(ACTORS, COSTS.link_bytes_per_s), COSTS)
    most = what.most_tokens_per_actor * ACTORS
    assert most / costs.step_s(most)[0] == pytest.approx(rate)
    assert usual_budget_bytes(fleet) == 2 * LAYERS * 1e6
