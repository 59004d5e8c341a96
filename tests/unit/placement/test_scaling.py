import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecluster.placement.scaling import SizeObservation, SizeSettings, SizeState, decide_size

SETTINGS = SizeSettings(min_actors=2, max_actors=8, upscale_delay_s=30.0, downscale_delay_s=600.0)


def seen(
    now_s: float = 0.0, *, actors: int = 4, busy: float = 0.6, queue_s: float = 0.0, needed: int = 1
) -> SizeObservation:
    return SizeObservation(now_s=now_s, actors=actors, busy_share=busy, queue_s=queue_s, needed=needed)


def decisions(observations: list[SizeObservation], state: SizeState) -> tuple[int, str, SizeState]:
    wanted, why = 0, ""
    for observation in observations:
        wanted, why, state = decide_size(observation, state, SETTINGS)
    return wanted, why, state


def last_decision(observations: list[SizeObservation]) -> tuple[int, str]:
    return decisions(observations, SizeState())[:2]


def test_busy_actors_get_help_once_they_have_been_busy_for_the_delay() -> None:
    busy = [seen(float(t), busy=0.95) for t in range(0, 35, 5)]
    assert last_decision(busy[:6])[0] == 4, "25 s are not yet 30"
    wanted, why = last_decision(busy)
    assert wanted == 6, "4 x 0.95 / 0.7 rounded up"
    assert "95% of the time" in why and "for 30 s" in why


def test_messages_that_wait_ask_for_one_more_actor() -> None:
    assert last_decision([seen(0.0, queue_s=0.2), seen(40.0, queue_s=0.2)])[0] == 5


def test_a_pause_in_between_begins_the_delay_anew() -> None:
    observations = [seen(0.0, busy=0.95), seen(20.0, busy=0.6), seen(40.0, busy=0.95), seen(60.0, busy=0.95)]
    assert last_decision(observations)[0] == 4


def test_idle_actors_are_drained_after_the_longer_delay() -> None:
    idle = [seen(float(t), busy=0.1) for t in range(0, 601, 100)]
    assert last_decision(idle[:-1])[0] == 4
    assert last_decision(idle)[0] == 2, "the least that is allowed"


def test_slots_set_a_floor() -> None:
    assert last_decision([seen(0.0, busy=0.0, needed=3), seen(700.0, busy=0.0, needed=3)])[0] == 3


@pytest.mark.parametrize(("actors", "wanted"), [(1, 2), (12, 8)])
def test_limits_hold_at_once(actors: int, wanted: int) -> None:
    decided, why = last_decision([seen(actors=actors)])
    assert decided == wanted and "limits are 2 to 8" in why


@given(busy=st.floats(0, 1), queue_s=st.floats(0, 1), actors=st.integers(2, 8))
def test_a_size_that_was_chosen_is_kept_under_the_same_work(busy: float, queue_s: float, actors: int) -> None:
    """No oscillation: after a change, the same work spread over the new number of actors does not reverse it."""
    first = seen(0.0, actors=actors, busy=busy, queue_s=queue_s)
    wanted, _, state = decisions([first, dataclasses.replace(first, now_s=1000.0)], SizeState())
    assert SETTINGS.min_actors <= wanted <= SETTINGS.max_actors
    if wanted == actors or busy * actors / wanted > 1:
        return
    after = seen(2000.0, actors=wanted, busy=busy * actors / wanted, queue_s=0.0 if wanted > actors else queue_s)
    again, _, _ = decisions([after, dataclasses.replace(after, now_s=5000.0)], state)
    assert (again - wanted) * (wanted - actors) >= 0, f"{actors} -> {wanted} -> {again}"


def test_while_an_actor_is_silent_none_is_ended_and_more_may_still_come() -> None:
    idle = [dataclasses.replace(seen(float(t), busy=0.0), silent=1) for t in range(0, 1801, 60)]
    assert last_decision(idle)[0] == 4
    busy = [dataclasses.replace(seen(float(t), busy=0.95), silent=1) for t in range(0, 35, 5)]
    assert last_decision(busy)[0] == 6
