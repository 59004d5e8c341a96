import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecluster.placement.scaling import (
    CROWDED_DELAYS,
    RouterObservation,
    RouterSizeSettings,
    SizeState,
    decide_routers,
)

SETTINGS = RouterSizeSettings(
    min_routers=1, max_routers=6, target_requests=8.0, target_waiting=1.0, upscale_delay_s=10.0, downscale_delay_s=300.0
)


def seen(now_s: float, texts: int, *, routers: int = 2, waiting: int = 0) -> RouterObservation:
    return RouterObservation(now_s=now_s, routers=routers, running=texts - waiting, waiting=waiting)


def decide(*observations: RouterObservation, state: SizeState | None = None) -> tuple[int, str, SizeState]:
    """Returns the last decision; asserts that earlier ones change nothing."""
    wanted, why, state = 0, "", state or SizeState()
    for observation in observations[:-1]:
        wanted, why, state = decide_routers(observation, state, SETTINGS)
        assert (wanted, why) == (observation.routers, "")
    return decide_routers(observations[-1], state, SETTINGS)


def test_texts_beyond_the_target_bring_as_many_routers_as_they_take_once_the_delay_is_over() -> None:
    wanted, why, _ = decide(*(seen(float(t), 33) for t in range(0, 11, 2)))
    assert wanted == 5, "33 / 8 rounded up"
    assert "a router has 16.5 requests (aim 8)" in why and "for 10 s" in why


def test_texts_that_wait_bring_one_more_router_however_few_run() -> None:
    assert decide(seen(0.0, 6, waiting=3), seen(10.0, 6, waiting=3))[0] == 3


def test_a_burst_that_is_over_before_the_delay_brings_none() -> None:
    assert decide(seen(0.0, 40), seen(8.0, 40), seen(9.0, 10), seen(12.0, 40), seen(20.0, 40))[0] == 2


def test_a_peak_at_the_end_of_the_delay_does_not_count_for_all_of_it() -> None:
    assert decide(seen(0.0, 18), seen(5.0, 20), seen(10.0, 48))[0] == 3, "18 texts take 3"


def test_idle_routers_leave_after_the_longer_delay_down_to_the_least() -> None:
    idle = [seen(float(t), 0, routers=4) for t in range(0, 301, 50)]
    wanted, why, _ = decide(*idle)
    assert wanted == 1 and "for 300 s" in why


def test_no_more_leave_than_the_busiest_moment_of_the_delay_could_do_without() -> None:
    assert decide(seen(0.0, 0, routers=4), seen(150.0, 14, routers=4), seen(300.0, 0, routers=4))[0] == 2


def test_a_router_stays_if_the_others_would_be_filled_to_the_brim_or_texts_wait() -> None:
    assert decide(seen(0.0, 8), seen(400.0, 8))[0] == 2, "one router would have just the 8 of the target"
    assert decide(seen(0.0, 7), seen(400.0, 7))[0] == 1
    assert decide(seen(0.0, 7, waiting=2), seen(400.0, 7, waiting=2))[0] == 2


@pytest.mark.parametrize(("routers", "wanted"), [(8, 6), (7, 6)])
def test_limits_hold_at_once(routers: int, wanted: int) -> None:
    decided, why, _ = decide(seen(0.0, 0, routers=routers))
    assert decided == wanted and why == "the limits are 1 to 6 routers"


def test_no_load_goes_beyond_the_limits() -> None:
    assert decide(seen(0.0, 10_000, routers=6, waiting=9000), seen(100.0, 10_000, routers=6, waiting=9000))[0] == 6


def test_a_number_with_which_texts_waited_is_not_gone_back_to_soon() -> None:
    wanted, _, state = decide(seen(0.0, 6, waiting=3), seen(10.0, 6, waiting=3))
    assert wanted == 3
    until_s = 10.0 + CROWDED_DELAYS * SETTINGS.downscale_delay_s
    calm = [seen(t, 6, routers=3) for t in (20.0, 400.0, until_s - 1.0)]
    wanted, _, state = decide(*calm, state=state)
    assert wanted == 3
    assert decide(seen(until_s, 6, routers=3), seen(until_s + 300.0, 6, routers=3), state=state)[0] == 1


def test_a_number_that_the_texts_themselves_had_outgrown_is_gone_back_to() -> None:
    wanted, _, state = decide(seen(0.0, 30, waiting=20), seen(10.0, 30, waiting=20))
    assert wanted == 4
    assert decide(seen(20.0, 0, routers=4), seen(320.0, 0, routers=4), state=state)[0] == 1


def test_a_wish_from_before_another_number_was_ordered_does_not_turn_round() -> None:
    _, _, state = decide(seen(0.0, 24))  # a third one is needed
    assert decide(seen(10.0, 48, routers=5), state=state)[0] == 6
    _, _, state = decide(seen(0.0, 14, routers=4))
    assert decide(seen(400.0, 0, routers=2), state=state)[0] == 1


@given(texts=st.integers(0, 60), waiting_part=st.floats(0, 1), routers=st.integers(1, 6))
def test_a_number_that_was_chosen_is_kept_under_the_same_texts(texts: int, waiting_part: float, routers: int) -> None:
    """No oscillation: after a change, the same requests over the new number of routers do not reverse it."""
    waiting = int(texts * waiting_part)
    first = [seen(t, texts, routers=routers, waiting=waiting) for t in (0.0, 1000.0)]
    wanted, _, state = decide(*first)
    assert 1 <= wanted <= 6
    if wanted == routers:
        return
    left = 0 if wanted > routers else math.ceil(waiting * wanted / routers)
    again, _, _ = decide(*(seen(t, texts, routers=wanted, waiting=left) for t in (2000.0, 3000.0)), state=state)
    assert (again - wanted) * (wanted - routers) >= 0, f"{routers} -> {wanted} -> {again}"


def test_while_a_router_is_silent_none_is_ended_and_more_may_still_come() -> None:
    idle = [replace(seen(float(t), 0, routers=4), silent=1) for t in range(0, 601, 50)]
    assert decide(*idle)[0] == 4
    busy = [replace(seen(float(t), 33), silent=1) for t in range(0, 11, 2)]
    assert decide(*busy)[0] == 5
