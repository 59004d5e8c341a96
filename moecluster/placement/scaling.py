"""How many expert actors and how many routers there should be: pure functions of load, with hysteresis.

The shape is Ray Serve's autoscaling policy: a wish must last for a delay before it is acted on, upwards shortly,
downwards long, so that bursts and pauses do not make processes come and go. What is acted on is the least change that
was wished for all along. A size at which there was a queue, though it would do for the work, is not gone back to for
some time, however idle the larger one is: the queue was the reason.

A router that is asked for serves only after its cold start: seconds for a process with torch and transformers, and its
trunk on top. So a burst waits for upscale_delay_s and the cold start together. An upscale delay far below a cold start
gains little, and starts routers for bursts that are over when they come. A downscale delay ought to be many cold
starts: to have been wrong costs one. A router that is still leaving is taken back without one.
"""

import math
from dataclasses import dataclass, replace

ROOMY = 0.9  # part of what a member shall have to do: fewer are only wished for if they would have no more
CROWDED_DELAYS = 10.0  # downscale delays for which a size that was too small is not gone back to


@dataclass(frozen=True, kw_only=True)
class SizeState:
    """Since when more, or fewer, have been wished for."""

    more_since_s: float | None = None
    fewer_since_s: float | None = None
    nearest: int = 0  # of the sizes wished for since then: the least change
    crowded: int = 0  # a size at which there was a queue all the same ...
    crowded_until_s: float = 0.0  # ... and until when it is not gone back to


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a look at the load asks for."""

    now_s: float
    size: int  # as it is, what is on its way included
    work: float  # what there is to do; 1 is what one member shall have to do
    lowest: int
    highest: int
    queues: bool  # there is a queue: one more than now, whatever the work says
    calm: bool  # there is none, so that they may be fewer


def act_on(
    wish: Wish, state: SizeState, *, upscale_delay_s: float, downscale_delay_s: float
) -> tuple[int, float, SizeState]:
    """(size, for how long it was wished for, new state). The size is that of now as long as nothing is to be done.

    Wished for are as many as the work takes, and one more than now if there is a queue. The size of now lies within
    the limits.
    """
    now_s, size = wish.now_s, wish.size
    crowded = state.crowded if now_s < state.crowded_until_s else 0
    wished = math.ceil(wish.work - 1e-9)
    unexplained = wish.queues and wished <= size  # going by the work alone, they would do
    if wish.queues:
        wished = max(wished, size + 1)
    wished = min(max(wished, wish.lowest, min(crowded + 1, size)), wish.highest)
    if wished > size:
        since_s = now_s if state.more_since_s is None else state.more_since_s
        nearest = wished if state.more_since_s is None else max(min(wished, state.nearest), size + 1)
        if now_s - since_s < upscale_delay_s:
            return size, 0.0, replace(state, more_since_s=since_s, fewer_since_s=None, nearest=nearest)
        after = replace(state, more_since_s=None, fewer_since_s=None)
        if unexplained:
            after = replace(after, crowded=size, crowded_until_s=now_s + CROWDED_DELAYS * downscale_delay_s)
        return nearest, now_s - since_s, after
    if wished < size and wish.calm and wish.work / max(wished, 1) <= ROOMY:
        since_s = now_s if state.fewer_since_s is None else state.fewer_since_s
        nearest = wished if state.fewer_since_s is None else min(max(wished, state.nearest), size - 1)
        if now_s - since_s < downscale_delay_s:
            return size, 0.0, replace(state, more_since_s=None, fewer_since_s=since_s, nearest=nearest)
        return nearest, now_s - since_s, replace(state, more_since_s=None, fewer_since_s=None)
    return size, 0.0, replace(state, more_since_s=None, fewer_since_s=None)


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


@dataclass(frozen=True, kw_only=True)
class SizeSettings:
    """Limits and aims of the cluster's size."""

    min_actors: int
    max_actors: int
    target_queue_s: float = 0.05  # mean wait of a message at an actor that is still fine
    target_utilisation: float = 0.7  # busy share of an actor's time that is aimed at
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class SizeObservation:
    """All expert actors between two looks."""

    now_s: float
    actors: int  # that serve, or are on their way
    busy_share: float  # mean over the actors, 0 to 1
    queue_s: float  # mean wait of a message; 0 without messages
    needed: int = 1  # the fewest actors whose slots hold every expert


def decide_size(seen: SizeObservation, state: SizeState, settings: SizeSettings) -> tuple[int, str, SizeState]:
    """(number of actors, why, new state). The number equals seen.actors as long as nothing is to be done.

    Wished for are as many actors as bring utilisation to its target, and one more if messages wait too long. Fewer
    are only wished for if utilisation would stay under its target by a tenth with them, and nothing waits.
    """
    lowest = max(settings.min_actors, seen.needed)
    within = min(max(seen.actors, lowest), settings.max_actors)
    if within != seen.actors:
        return within, f"the limits are {lowest} to {settings.max_actors} expert actors", state
    wish = Wish(
        now_s=seen.now_s,
        size=seen.actors,
        work=seen.busy_share * seen.actors / settings.target_utilisation,
        lowest=lowest,
        highest=settings.max_actors,
        queues=seen.queue_s > settings.target_queue_s,
        calm=seen.queue_s <= settings.target_queue_s / 2,
    )
    wanted, seconds, state = act_on(
        wish, state, upscale_delay_s=settings.upscale_delay_s, downscale_delay_s=settings.downscale_delay_s
    )
    return wanted, _why(seen, settings, seconds) if wanted != seen.actors else "", state


def _why(seen: SizeObservation, settings: SizeSettings, seconds: float) -> str:
    return (
        f"actors are busy {seen.busy_share:.0%} of the time (aim {settings.target_utilisation:.0%}) and messages wait "
        f"{seen.queue_s * 1e3:.1f} ms (aim {settings.target_queue_s * 1e3:g} ms), for {seconds:.0f} s"
    )
