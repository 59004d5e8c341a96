"""How many expert actors there should be: a pure function of queue times and utilisation, with hysteresis."""

from dataclasses import dataclass

from moecluster.placement.hysteresis import SizeState, Wish, act_on


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
