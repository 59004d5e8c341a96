"""How many expert actors there should be: a pure function of queue times and utilisation, with hysteresis.

The shape is Ray Serve's autoscaling policy: a wish must last for a delay before it is acted on, upwards shortly,
downwards long, so that bursts and pauses do not make actors come and go. A size at which messages waited too long is
not gone back to for some time, however idle the larger one is: the queue was the reason.
"""

import math
from dataclasses import dataclass, replace

CROWDED_DELAYS = 10.0  # downscale delays for which a size that was too small is not gone back to


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


@dataclass(frozen=True, kw_only=True)
class SizeState:
    """Since when more, or fewer, actors have been wished for."""

    more_since_s: float | None = None
    fewer_since_s: float | None = None
    crowded_actors: int = 0  # a size at which messages waited too long ...
    crowded_until_s: float = 0.0  # ... and until when it is not gone back to


def decide_size(seen: SizeObservation, state: SizeState, settings: SizeSettings) -> tuple[int, str, SizeState]:
    """(number of actors, why, new state). The number equals seen.actors as long as nothing is to be done.

    Wished for are as many actors as bring utilisation to its target, and one more if messages wait too long. Fewer
    are only wished for if utilisation would stay under its target by a tenth with them, and nothing waits.
    """
    lowest = max(settings.min_actors, seen.needed)
    crowded = state.crowded_actors if seen.now_s < state.crowded_until_s else 0
    within = min(max(seen.actors, lowest), settings.max_actors)
    if within != seen.actors:
        return within, f"the limits are {lowest} to {settings.max_actors} expert actors", state
    work = seen.busy_share * seen.actors  # in actors that are busy all the time
    wished = math.ceil(work / settings.target_utilisation - 1e-9)
    waits = seen.queue_s > settings.target_queue_s
    if waits:
        wished = max(wished, seen.actors + 1)
    wished = min(max(wished, lowest, min(crowded + 1, seen.actors)), settings.max_actors)
    if wished > seen.actors:
        since_s = seen.now_s if state.more_since_s is None else state.more_since_s
        if seen.now_s - since_s < settings.upscale_delay_s:
            return seen.actors, "", replace(state, more_since_s=since_s, fewer_since_s=None)
        after = replace(state, more_since_s=None, fewer_since_s=None)
        if waits:
            until_s = seen.now_s + CROWDED_DELAYS * settings.downscale_delay_s
            after = replace(after, crowded_actors=seen.actors, crowded_until_s=until_s)
        return wished, _why(seen, settings, seen.now_s - since_s), after
    fewer = wished < seen.actors and work / max(wished, 1) <= 0.9 * settings.target_utilisation
    if fewer and seen.queue_s <= settings.target_queue_s / 2:
        since_s = seen.now_s if state.fewer_since_s is None else state.fewer_since_s
        after = replace(state, more_since_s=None, fewer_since_s=since_s)
        if seen.now_s - since_s < settings.downscale_delay_s:
            return seen.actors, "", after
        return wished, _why(seen, settings, seen.now_s - since_s), replace(after, fewer_since_s=None)
    return seen.actors, "", replace(state, more_since_s=None, fewer_since_s=None)


def _why(seen: SizeObservation, settings: SizeSettings, seconds: float) -> str:
    return (
        f"actors are busy {seen.busy_share:.0%} of the time (aim {settings.target_utilisation:.0%}) and messages wait "
        f"{seen.queue_s * 1e3:.1f} ms (aim {settings.target_queue_s * 1e3:g} ms), for {seconds:.0f} s"
    )
