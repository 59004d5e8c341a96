"""Autoscaling of expert actors and routers: pure functions of load, with hysteresis.

The scheme is Ray Serve's autoscaling policy: a desired change must last for a delay before it is applied, a short one
upwards, a long one downwards, so that bursts and pauses do not start and stop processes. What is applied is the
smallest change desired during the delay. A size that had a queue although it sufficed for the work is not returned to
for some time, however idle the larger size is.

A new router serves only after its cold start: seconds for a process with torch and transformers, plus its trunk. So a
burst waits for upscale_delay_s plus the cold start. An upscale delay far below a cold start gains little, and starts
routers for bursts that are over when they are ready. A downscale delay should be many cold starts, since a wrong
downscale costs one. A router that is still leaving is taken back without a cold start.
"""

import math
from dataclasses import dataclass, replace

ROOMY = 0.9  # scale down only if the remaining members would be at most this loaded, relative to the target
CROWDED_DELAYS = 10.0  # downscale delays for which a size that was too small is avoided


@dataclass(frozen=True, kw_only=True)
class SizeState:
    """How long a larger or a smaller size has been desired."""

    more_since_s: float | None = None
    fewer_since_s: float | None = None
    nearest: int = 0  # the smallest change desired since then, as a size
    crowded: int = 0  # a size that had a queue although it sufficed for the work ...
    crowded_until_s: float = 0.0  # ... and until when it is avoided


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What one observation of the load asks for."""

    now_s: float
    size: int  # current, including members that are starting
    work: float  # work to do; 1 is the target of one member
    lowest: int
    highest: int
    queues: bool  # there is a queue: ask for one more than now, whatever the work
    calm: bool  # there is no queue, so scaling down is allowed


def act_on(
    wish: Wish, state: SizeState, *, upscale_delay_s: float, downscale_delay_s: float
) -> tuple[int, float, SizeState]:
    """Returns (size, seconds that it was desired, new state). The size is the current one if nothing is to be done.

    The desired size is what the work needs, and at least one more than now if there is a queue. The current size lies
    within the limits.
    """
    now_s, size = wish.now_s, wish.size
    crowded = state.crowded if now_s < state.crowded_until_s else 0
    wished = math.ceil(wish.work - 1e-9)
    unexplained = wish.queues and wished <= size  # the work alone does not explain the queue
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
    """Limits and targets of the number of routers."""

    min_routers: int
    max_routers: int
    target_requests: float = 8.0  # running and waiting at one router
    target_waiting: float = 1.0  # highest acceptable number of requests that wait, mean over the routers
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0


@dataclass(frozen=True, kw_only=True)
class RouterObservation:
    """All routers that stay, at one moment."""

    now_s: float
    routers: int  # serving or starting
    running: int  # requests, over all routers
    waiting: int  # requests not started yet, over all routers
    silent: int = 0  # routers that have not reported lately: what they do is unknown, so none is ended


def decide_routers(
    seen: RouterObservation, state: SizeState, settings: RouterSizeSettings
) -> tuple[int, str, SizeState]:
    """Returns (number of routers, reason, new state). The number equals seen.routers if nothing is to be done.

    The desired number brings each router's requests to the target, and is at least one more than now if too many wait.
    Scaling down requires that all have reported, that the remaining routers stay a tenth below the target, and that
    hardly any request waits.
    """
    lowest, highest = settings.min_routers, settings.max_routers
    within = min(max(seen.routers, lowest), highest)
    if within != seen.routers:
        return within, f"the limits are {lowest} to {highest} routers", state
    waiting = seen.waiting / seen.routers
    wish = Wish(
        now_s=seen.now_s,
        size=seen.routers,
        work=(seen.running + seen.waiting) / settings.target_requests,
        lowest=lowest,
        highest=highest,
        queues=waiting > settings.target_waiting,
        calm=waiting <= settings.target_waiting / 2 and not seen.silent,
    )
    wanted, seconds, state = act_on(
        wish, state, upscale_delay_s=settings.upscale_delay_s, downscale_delay_s=settings.downscale_delay_s
    )
    if wanted == seen.routers:
        return wanted, "", state
    requests = (seen.running + seen.waiting) / seen.routers
    why = (
        f"a router has {requests:.1f} requests (aim {settings.target_requests:g}), {waiting:.1f} of which wait "
        f"(aim {settings.target_waiting:g}); more or fewer were needed for {seconds:.0f} s"
    )
    return wanted, why, state


@dataclass(frozen=True, kw_only=True)
class SizeSettings:
    """Limits and targets of the cluster's size."""

    min_actors: int
    max_actors: int
    target_queue_s: float = 0.05  # highest acceptable mean wait of a message at an actor
    target_utilization: float = 0.7  # target of the busy share of an actor's time
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class SizeObservation:
    """All expert actors between two observations."""

    now_s: float
    actors: int  # serving or starting
    busy_share: float  # mean over the actors, 0 to 1
    queue_s: float  # mean wait of a message; 0 without messages
    needed: int = 1  # the fewest actors whose slots hold every expert
    silent: int = 0  # actors that have not reported lately: they are not idle, so none is ended


def decide_size(seen: SizeObservation, state: SizeState, settings: SizeSettings) -> tuple[int, str, SizeState]:
    """Returns (number of actors, reason, new state). The number equals seen.actors if nothing is to be done.

    The desired number brings utilization to its target, and is at least one more than now if messages wait too long.
    Scaling down requires that all have reported, that utilization stays a tenth below its target afterwards, and that
    nothing waits.
    """
    lowest = max(settings.min_actors, seen.needed)
    within = min(max(seen.actors, lowest), settings.max_actors)
    if within != seen.actors:
        return within, f"the limits are {lowest} to {settings.max_actors} expert actors", state
    wish = Wish(
        now_s=seen.now_s,
        size=seen.actors,
        work=seen.busy_share * seen.actors / settings.target_utilization,
        lowest=lowest,
        highest=settings.max_actors,
        queues=seen.queue_s > settings.target_queue_s,
        calm=seen.queue_s <= settings.target_queue_s / 2 and not seen.silent,
    )
    wanted, seconds, state = act_on(
        wish, state, upscale_delay_s=settings.upscale_delay_s, downscale_delay_s=settings.downscale_delay_s
    )
    return wanted, _why(seen, settings, seconds) if wanted != seen.actors else "", state


def _why(seen: SizeObservation, settings: SizeSettings, seconds: float) -> str:
    return (
        f"actors are busy {seen.busy_share:.0%} of the time (aim {settings.target_utilization:.0%}) and messages wait "
        f"{seen.queue_s * 1e3:.1f} ms (aim {settings.target_queue_s * 1e3:g} ms), for {seconds:.0f} s"
    )
