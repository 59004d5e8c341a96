"""Replays: each window is scored on earlier decisions, on any fleet, with deaths; and initial layouts."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecluster.errors import ConfigError, ResourceError
from moecluster.placement.layout import Fleet
from moecluster.placement.load.window import ExponentialWindow
from moecluster.placement.names import balancedness_L
from moecluster.placement.policy.interface import Decision, Observation, decision_of
from moecluster.placement.policy.registry import policy_named
from moecluster.simulation.layouts import (
    contiguous_layout,
    hosted_experts_LE,
    layers_taken,
    surviving,
    uniform_fleet,
    usual_budget_bytes,
)
from moecluster.simulation.replay import Replay, ReplayedWindow, replay_fleet, summarize
from moecluster.simulation.synthetic_load import LoadShape, SyntheticLoads
from moecluster.simulation.trace.format import TraceActor, TraceEvent, TraceHeader, TraceLayer, TraceWindow
from tests.support.fakes.proportional_policy import ProportionalPolicy
from tests.support.known import known

HEADER = TraceHeader(
    model="tiny",
    window_s=10.0,
    layers=tuple(TraceLayer(layer=layer, experts=16, expert_bytes=1000) for layer in (1, 2, 3)),
    actors=tuple(TraceActor(name=f"expert-{i}", slots=6, speed=1.0, node=f"host-{i // 2}") for i in range(4)),
)


def windows(count: int = 20, events: dict[int, TraceEvent] | None = None) -> list[TraceWindow]:
    shape = LoadShape(num_layers=3, num_experts=16, top_k=2, tokens_per_s=5000.0, drift_time_s=600.0)
    return [
        TraceWindow(
            time_s=load.time_s,
            counts_LE=load.counts_LE,
            events=(events[number],) if events and number in events else (),
        )
        for number, load in enumerate(SyntheticLoads(shape, window_s=10.0, num_windows=count, seed=3))
    ]


def replaying(policy, *, fleet: Fleet | None = None, budget_bytes: float = 1e9) -> Replay:
    recorded, actors = replay_fleet(HEADER, num_actors=None, slots=None)
    window = ExponentialWindow({layer.layer: layer.experts for layer in HEADER.layers}, half_life_s=10.0)
    ticks = itertools.count()
    return Replay(
        HEADER, policy, fleet or recorded, actors, window, budget_bytes=budget_bytes, clock=lambda: next(ticks) * 0.25
    )


def replayed(policy, seen: Sequence[TraceWindow], **options) -> list[ReplayedWindow]:
    replay = replaying(policy, **options)
    return [replay.step(window) for window in seen]


@dataclass(frozen=True)
class KeepAll:
    """A policy that changes nothing and records its inputs."""

    name: str = "keep"
    shown: list[Observation] = field(default_factory=list)

    def first_state(self) -> None: ...

    def decide(self, seen: Observation, state: None) -> tuple[Decision, None]:
        self.shown.append(seen)
        return decision_of(seen, seen.layout, "as it is"), None


def test_a_window_is_scored_on_the_placement_decided_before_it() -> None:
    seen = windows()
    steps = replayed(ProportionalPolicy(), seen)
    fleet = HEADER.fleet()
    first = contiguous_layout(HEADER.num_experts_L, fleet)
    expected = balancedness_L(first, seen[0].counts_LE.astype(float), fleet).mean()
    assert steps[0].balancedness == pytest.approx(expected)
    assert known(steps[0].balancedness) < 0.7 < min(known(step.balancedness) for step in steps[1:])
    assert (steps[0].replicas, steps[1].replicas) == (48, 72)
    assert steps[0].moved_bytes >= 24 * 1000
    assert [step.decide_s for step in steps] == [0.25] * 20
    assert steps[0].reason == "the first plan"
    assert steps[4].reason.startswith("asked 4 times")
    assert [step.tokens for step in steps] == [int(window.counts_LE.sum()) for window in seen]


def test_a_policy_sees_the_load_up_to_now_and_the_budget() -> None:
    steps = windows(3)
    policy = KeepAll()
    replayed(policy, steps, budget_bytes=500.0)
    seen = policy.shown
    assert [observation.budget_bytes for observation in seen] == [500.0, 500.0]
    assert [observation.now_s for observation in seen] == [20.0, 30.0]
    rates = [window.counts_LE / 10.0 for window in steps]
    np.testing.assert_allclose(seen[0].load_LE, (2 * rates[1] + rates[0]) / 3)
    np.testing.assert_allclose(seen[1].load_LE, (4 * rates[2] + 2 * rates[1] + rates[0]) / 7)


def test_the_summary_leaves_the_cold_plan_out() -> None:
    steps = replayed(ProportionalPolicy(), windows())
    summary = summarize("proportional", steps)
    assert summary.cold_bytes == steps[0].moved_bytes
    assert summary.moved_bytes == sum(step.moved_bytes for step in steps[1:])
    assert summary.windows == 19
    assert summary.mean_balancedness == pytest.approx(np.mean([known(step.balancedness) for step in steps[1:]]))
    assert summary.lost_part == 0
    with pytest.raises(ConfigError, match="one window, expected at least 2"):
        summarize("proportional", steps[:1])


def test_deaths_of_a_trace_cost_tokens_until_the_next_decision() -> None:
    died = TraceEvent(kind="actor_died", actor="expert-1")
    returned = TraceEvent(kind="actor_returned", actor="expert-1")
    fleet = uniform_fleet(4, 4, np.full(3, 1000.0))
    seen = windows(12, {4: died, 8: returned})
    steps = replayed(KeepAll(), seen, fleet=fleet)
    assert [step.replicas for step in steps] == [48] * 4 + [36] * 8
    assert all(step.lost_part == 0 for step in steps[:4])
    assert 0.15 < known(steps[4].lost_part) < 0.35
    roomy = dataclasses.replace(fleet, slots_A=np.full(4, 6))
    steps = replayed(policy_named("static"), seen, fleet=roomy)
    lost = {number for number, step in enumerate(steps) if known(step.lost_part) > 0}
    assert lost <= {4}
    assert steps[4].replicas == 54 and steps[5].replicas >= 48
    assert summarize("static", steps).lost_part == pytest.approx(known(steps[4].lost_part) / 11, rel=0.1)


def test_an_actor_that_died_and_returned_within_a_window_has_lost_its_experts() -> None:
    events = tuple(TraceEvent(kind=kind, actor="expert-0") for kind in ("actor_died", "actor_returned"))
    first, second, third = windows(3)
    second = TraceWindow(time_s=second.time_s, counts_LE=second.counts_LE, events=events)
    steps = replayed(policy_named("static"), (first, second, third), fleet=uniform_fleet(4, 4, np.full(3, 1000.0)))
    assert known(steps[1].lost_part) > 0.15 and steps[1].replicas == 36
    assert steps[2].lost_part == 0 and steps[2].replicas == 48


def test_while_there_are_fewer_slots_than_experts_nothing_is_decided() -> None:
    died = {number: TraceEvent(kind="actor_died", actor=f"expert-{number}") for number in (1, 2)}
    steps = replayed(KeepAll(), windows(4, died))
    assert steps[2].reason == steps[3].reason == "fewer slots than experts until an actor returns"
    assert known(steps[3].lost_part) > known(steps[1].lost_part) > 0


def test_fleets_to_replay_on() -> None:
    recorded, names = replay_fleet(HEADER, num_actors=None, slots=None)
    assert recorded.slots_A.tolist() == [6] * 4 and names[3] == "expert-3"
    assert replay_fleet(HEADER, num_actors=None, slots=9)[0].slots_A.tolist() == [9] * 4
    other, names = replay_fleet(HEADER, num_actors=5, slots=None)
    assert other.slots_A.tolist() == [5] * 5 and names[-1] == "expert-4"
    assert len(set(other.node_A.tolist())) == 5
    for options in ({"num_actors": 0, "slots": None}, {"num_actors": None, "slots": -1}):
        with pytest.raises(ConfigError, match="expected at least 1"):
            replay_fleet(HEADER, **options)


@pytest.mark.parametrize("budget", [0.0, -5.0, float("nan")])
def test_a_budget_of_nothing_is_refused(budget) -> None:
    with pytest.raises(ConfigError, match="expected more than 0 for each decision"):
        replaying(KeepAll(), budget_bytes=budget)


def test_fewer_slots_than_experts_are_refused() -> None:
    fleet, _ = replay_fleet(HEADER, num_actors=3, slots=5)
    with pytest.raises(ResourceError, match="15 slots"):
        replaying(KeepAll(), fleet=fleet)


@given(
    slots=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    spare=st.integers(0, 20),
)
def test_contiguous_layouts_fit_any_slots(slots, spare) -> None:
    slots_A = np.array(slots)
    experts = max(int(slots_A.sum()) - spare, 1)
    num_experts_L = np.array([experts, max(experts // 2, 1)])
    fleet = Fleet(slots_A=slots_A, speed_A=np.ones(len(slots)), node_A=np.arange(len(slots)), expert_bytes_L=np.ones(2))
    layout = contiguous_layout(num_experts_L, fleet)
    assert layout.num_replicas == num_experts_L.sum()
    for layer in (0, 1):
        actors = layout.actor_R[layout.layer_R == layer]
        assert (np.diff(actors) >= 0).all()
        assert (np.bincount(actors, minlength=len(slots)) <= slots_A).all()


def test_layouts_partway() -> None:
    fleet = uniform_fleet(4, 6, np.full(3, 1000.0), actors_per_node=2)
    assert fleet.node_A.tolist() == [0, 0, 1, 1] and usual_budget_bytes(fleet) == 18_000
    before = contiguous_layout(np.full(3, 16), fleet)
    seen = Observation(
        now_s=0.0, load_LE=windows(1)[0].counts_LE.astype(float), fleet=fleet, layout=before, budget_bytes=1e9
    )
    decision: Decision = ProportionalPolicy().decide(seen, ProportionalPolicy().first_state())[0]
    partly = layers_taken(before, decision.layout, np.array([False, True, False]))
    for layer, source in ((0, before), (1, decision.layout), (2, before)):
        mine, whole = partly.layer_R == layer, source.layer_R == layer
        np.testing.assert_array_equal(partly.actor_R[mine], source.actor_R[whole])
        np.testing.assert_array_equal(partly.share_R[mine], source.share_R[whole])
    assert (np.diff(partly.layer_R * 16 + partly.expert_R) >= 0).all()

    left = surviving(decision.layout, np.array([True, False, False, False]))
    assert 0 not in left.actor_R
    sums_LE = np.bincount(left.expert_key_R, weights=left.share_R, minlength=48).reshape(3, 16)
    np.testing.assert_allclose(sums_LE[hosted_experts_LE(left)], 1.0)
    np.testing.assert_array_equal(sums_LE > 0, hosted_experts_LE(left))


def test_windows_without_a_token_are_not_judged() -> None:
    some = windows(6)
    silent = [TraceWindow(time_s=w.time_s, counts_LE=np.zeros_like(w.counts_LE)) for w in some]
    mixed = [*some[:3], *silent[3:]]
    steps = replayed(policy_named("share"), mixed)
    assert [step.balancedness is None for step in steps] == [False] * 3 + [True] * 3
    summary = summarize("share", steps)
    assert (summary.windows, summary.judged) == (5, 2)
    assert summary.mean_balancedness == pytest.approx(np.mean([known(step.balancedness) for step in steps[1:3]]))
    nothing = summarize("share", replayed(policy_named("share"), silent))
    assert nothing.judged == 0 and nothing.lost_part is None
    assert nothing.mean_balancedness is None and nothing.worst_balancedness is None
