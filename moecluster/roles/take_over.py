"""What a new controller learns from its actors, before it gives any order."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from moecluster.errors import InvalidMessage
from moecluster.rpc.picture import ControllerPicture, decode_picture
from moecluster.types import ExpertActorStatus

logger = logging.getLogger(__name__)

READ_TIMEOUT_S = 10.0  # for an actor's answer
READ_GRACE_S = 2.0  # for the others once one has answered: an actor that is being started has nothing to tell
MAX_READS_AT_ONCE = 32


def read_actors(read: Callable[[str], ExpertActorStatus | None], actors: Sequence[str]) -> list[ExpertActorStatus]:
    """What the actors say of themselves, by their placement numbers. read returns within READ_TIMEOUT_S; None: no
    answer."""
    pool = ThreadPoolExecutor(max_workers=min(len(actors), MAX_READS_AT_ONCE))
    waiting = {pool.submit(read, actor) for actor in actors}
    seen: list[ExpertActorStatus] = []
    deadline_s = time.monotonic() + READ_TIMEOUT_S
    while waiting and (left_s := deadline_s - time.monotonic()) > 0:
        answers, waiting = wait(waiting, left_s, FIRST_COMPLETED)
        if more := [status for answer in answers if (status := answer.result()) is not None]:
            seen += more
            deadline_s = min(deadline_s, time.monotonic() + READ_GRACE_S)
    pool.shutdown(wait=False, cancel_futures=True)
    return sorted(seen, key=lambda status: status.placement)


def newest_picture(seen: Sequence[ExpertActorStatus]) -> ControllerPicture | None:
    """The picture of the highest placement number that can be read; seen is sorted by that."""
    for status in reversed(seen):
        if status.picture:
            try:
                return decode_picture(status.picture)
            except InvalidMessage as exc:
                logger.warning("the picture that %s keeps cannot be read: %s", status.actor, exc)
    return None
