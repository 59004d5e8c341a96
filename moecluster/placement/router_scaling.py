"""How many routers there should be: a pure function of the texts that they have, with hysteresis.

A router that is asked for serves only after its cold start: seconds for a process with torch and transformers, and its
trunk on top. So a burst waits for upscale_delay_s and the cold start together. An upscale delay far below a cold start
gains little, and starts routers for bursts that are over when they come. A downscale delay ought to be many cold
starts: to have been wrong costs one. A router that is still leaving is taken back without one.
"""

from dataclasses import dataclass

from moecluster.placement.hysteresis import SizeState, Wish, act_on


@dataclass(frozen=True, kw_only=True)
class RouterSizeSettings:
    """Limits and aims of the number of routers."""

    min_routers: int
    max_routers: int
    target_texts: float = 8.0  # running and waiting at one router
    target_waiting: float = 1.0  # texts that wait at one router, mean over the routers, that is still fine
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0


@dataclass(frozen=True, kw_only=True)
class RouterObservation:
    """All routers that stay, at one moment."""

    now_s: float
    routers: int  # that serve, or are on their way
    running: int  # texts, over all routers
    waiting: int  # texts that are not begun yet, over all routers


def decide_routers(
    seen: RouterObservation, state: SizeState, settings: RouterSizeSettings
) -> tuple[int, str, SizeState]:
    """(number of routers, why, new state). The number equals seen.routers as long as nothing is to be done.

    Wished for are as many routers as bring the texts of each to the target, and one more than now if too many wait.
    Fewer are only wished for if their texts would stay under the target by a tenth, and hardly any wait.
    """
    lowest, highest = settings.min_routers, settings.max_routers
    within = min(max(seen.routers, lowest), highest)
    if within != seen.routers:
        return within, f"the limits are {lowest} to {highest} routers", state
    waiting = seen.waiting / seen.routers
    wish = Wish(
        now_s=seen.now_s,
        size=seen.routers,
        work=(seen.running + seen.waiting) / settings.target_texts,
        lowest=lowest,
        highest=highest,
        queues=waiting > settings.target_waiting,
        calm=waiting <= settings.target_waiting / 2,
    )
    wanted, seconds, state = act_on(
        wish, state, upscale_delay_s=settings.upscale_delay_s, downscale_delay_s=settings.downscale_delay_s
    )
    if wanted == seen.routers:
        return wanted, "", state
    texts = (seen.running + seen.waiting) / seen.routers
    why = (
        f"a router has {texts:.1f} texts (aim {settings.target_texts:g}), {waiting:.1f} of which wait "
        f"(aim {settings.target_waiting:g}); more or fewer were wished for {seconds:.0f} s"
    )
    return wanted, why, state
