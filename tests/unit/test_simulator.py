"""The simulator: its queue against arithmetic, its copies and deaths at exact times, its costs from the benchmark."""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import layer_inputs
from moecluster.errors import ConfigError, ResourceError
from moecluster.placement import costs as costs_module
from moecluster.placement.costs import Costs, calibrated
from moecluster.placement.decision import Decision, Observation, decision_of
from moecluster.placement.fluid_queue import FluidQueue, Served, StepCosts, steady_batch, step_costs
from moecluster.placement.growth import fit_power_law, measure_sizes, sizes_around
from moecluster.placement.layout import Layout, make_layout
from moecluster.placement.policies import POLICIES, policy_named
from moecluster.placement.scenario import Scenario, SimulatedWindow, balanced_tokens_per_s, summarize
from moecluster.placement.simulator import Simulator
from moecluster.placement.start import actor_bytes, contiguous_layout, uniform_fleet
from moecluster.placement.synthetic import LoadShape, SyntheticLoads
from moecluster.placement.transfers import STORE, schedule
from tests.proportional_policy import ProportionalPolicy

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "layer.json"
COSTS = Costs(message_s=1e-3, expert_s=1e-4, row_s=1e-5, row_bytes=1000.0, link_bytes_per_s=1e9)
LAYERS, EXPERTS, ACTORS = 3, 16, 8


# Costs


def test_costs_explain_the_benchmark_that_they_come_from() -> None:
    costs = calibrated(RESULT)
    rows = {row["name"]: row["value"] for row in json.loads(RESULT.read_text())["rows"]}
    for tokens in (1, 16, 256, 2048):
        touched = float(costs_module.touched(np.array(float(tokens))))
        predicted_s = costs.message_s + touched * costs.expert_s + tokens * costs.row_s
        measured_s = rows[f"ours: forward, bfloat16, {tokens} tokens, shm"] / 1e3
        assert predicted_s == pytest.approx(measured_s, rel=0.35)


def test_costs_know_the_layer_of_the_benchmark() -> None:
    assert costs_module.BENCH_WIDTH == layer_inputs.D_MODEL
    assert costs_module.BENCH_INNER == layer_inputs.D_INNER
    assert (costs_module.BENCH_EXPERTS, costs_module.BENCH_TOP_K) == (layer_inputs.NUM_EXPERTS, layer_inputs.TOP_K)


def test_calibration_finds_what_made_the_figures(tmp_path) -> None:
    made = Costs(message_s=2e-3, expert_s=5e-4, row_s=1e-5, link_bytes_per_s=1e9)
    tokens_to_actor = 1 - 6 / 28  # of 8 experts the actor holds 4; two are drawn
    rows = []
    for tokens in (1, 16, 256, 2048):
        shared_s = made.message_s + 4 * (1 - 0.75**tokens) * made.expert_s + tokens * made.row_s
        inline_s = shared_s + tokens * tokens_to_actor * made.row_bytes / made.link_bytes_per_s
        for transport, seconds in (("shm", shared_s), ("inline", inline_s)):
            name = f"ours: forward, bfloat16, {tokens} tokens, {transport}"
            rows.append({"name": name, "value": 1e3 * seconds, "unit": "ms"})
    (tmp_path / "layer.json").write_text(json.dumps({"rows": rows}))
    found = calibrated(tmp_path / "layer.json")
    for field in dataclasses.fields(Costs):
        assert getattr(found, field.name) == pytest.approx(getattr(made, field.name), rel=1e-6)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot be read"), ("{", "no result of benchmarks/layer.py"), ('{"rows": []}', "has 0 batch sizes")],
)
def test_a_file_without_costs(tmp_path, content, expected) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match=expected):
        calibrated(tmp_path / "x.json")


@pytest.mark.parametrize("wrong", [{"row_s": 0.0}, {"message_s": -1.0}, {"link_bytes_per_s": float("inf")}])
def test_costs_that_cannot_be(wrong) -> None:
    with pytest.raises(ConfigError, match=f"cost {next(iter(wrong))}: got"):
        dataclasses.replace(Costs(), **wrong)


# The queue


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
    assert (queue.backlog, served.tokens) == (pytest.approx(40.0), pytest.approx(200.0))
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
    assert (queue.held, served.tokens) == (pytest.approx(40.0), pytest.approx(60.0))
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


# Whole days


@dataclass(frozen=True)
class Still:
    """Changes nothing, whatever happens."""

    name: str = "still"

    def first_state(self) -> None: ...

    def decide(self, seen: Observation, state: None) -> tuple[Decision, None]:
        return decision_of(seen, seen.layout, "as it is"), None


def scenario(**changes) -> Scenario:
    quiet = Scenario(budget_bytes=1e9, actor_mtbf_hours=1e9, most_tokens_per_actor=64.0, window_s=60.0)
    return dataclasses.replace(quiet, **changes)


def simulated(policy, what: Scenario, *, num_windows: int = 60, slots: int = 4, part: float = 0.4, **shape):
    fleet = uniform_fleet(ACTORS, slots, np.full(LAYERS, 1e6), actors_per_node=2)
    rate = part * balanced_tokens_per_s(fleet, LAYERS, 2, COSTS, what)
    load = LoadShape(num_layers=LAYERS, num_experts=EXPERTS, top_k=2, tokens_per_s=rate, **shape)
    loads = SyntheticLoads(load, window_s=what.window_s, num_windows=num_windows, seed=1)
    ticks = itertools.count()
    simulator = Simulator(what, fleet, loads, policy, COSTS, clock=lambda: next(ticks) * 0.5)
    return list(simulator.run())


def came(windows: list[SimulatedWindow]) -> float:
    return sum(window.tokens_per_s for window in windows)


def test_equal_seeds_give_equal_days() -> None:
    what = scenario(actor_mtbf_hours=2.0)
    first, again = (simulated(ProportionalPolicy(), what) for _ in range(2))
    assert first == again
    assert simulated(ProportionalPolicy(), dataclasses.replace(what, seed=1)) != first


def test_a_policy_that_follows_the_load_serves_what_one_that_does_not_cannot() -> None:
    still, follows = (
        simulated(policy, scenario(), part=0.7, swing=0.0, zipf=1.2) for policy in (Still(), ProportionalPolicy())
    )
    assert sum(w.served_per_s for w in follows) > 1.2 * sum(w.served_per_s for w in still)
    assert summarize(follows).mean_balancedness > 0.7 > 0.5 > summarize(still).mean_balancedness
    assert still[-1].wait_s > 60 > follows[-1].wait_s == 0
    assert summarize(follows).served == pytest.approx(summarize(follows).tokens, rel=1e-3)


def test_decisions_come_with_the_first_window_and_then_by_the_period() -> None:
    windows = simulated(ProportionalPolicy(), scenario(decide_every=4), num_windows=13)
    decisions = [decision for window in windows for decision in window.decisions]
    assert [decision.time_s for decision in decisions] == [60.0, 240.0, 480.0, 720.0]
    assert {(d.cause, d.decide_s, d.observe_s) for d in decisions} == {("period", 0.5, 0.5)}
    first = decisions[0]
    # Each actor's link takes one copy at a time at a quarter of 1 GB/s: at most 4 slots x 3 layers of 4 ms each in a row.
    assert 0.012 <= first.apply_s <= 0.2
    assert windows[0].moved_bytes == first.moved_bytes >= LAYERS * EXPERTS * 1e6
    assert (windows[0].replicas, windows[1].replicas) == (LAYERS * EXPERTS, LAYERS * ACTORS * 4)


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
    assert 0 < summary.mean_balancedness <= 1
    assert windows[-1].replicas >= LAYERS * EXPERTS


# Growth


def test_a_power_law_is_found_and_says_where_time_runs_out() -> None:
    law = fit_power_law([10, 100, 1000], [2e-3, 2e-2, 2e-1])
    assert law.exponent == pytest.approx(1.0)
    assert law.size_at(1.0) == pytest.approx(5000.0)
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
    assert actor_bytes(fleet) == 2 * LAYERS * 1e6
