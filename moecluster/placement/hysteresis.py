"""When a wish for more or fewer of something is acted on: the part that decisions on sizes share.

The shape is Ray Serve's autoscaling policy: a wish must last for a delay before it is acted on, upwards shortly,
downwards long, so that bursts and pauses do not make processes come and go. What is acted on is the least change that
was wished for all along. A size at which there was a queue, though it would do for the work, is not gone back to for
some time, however idle the larger one is: the queue was the reason.
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
