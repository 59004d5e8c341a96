"""What a new controller learns from its actors, before it gives any order."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

from moecluster.errors import InvalidMessage
from moecluster.growing import MAX_NUMBER
from moecluster.roles.standing_versions import StandingVersions
from moecluster.rpc.picture import ControllerPicture, decode_picture
from moecluster.types import ExpertActorStatus, WeightVersion

logger = logging.getLogger(__name__)

READ_TIMEOUT_S = 10.0  # for an actor's answer
READ_GRACE_S = 2.0  # for the others once one has answered: an actor that is being started has nothing to tell
MAX_READS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a controller begins with."""

    term: int  # higher than every actor has seen
    generation: int
    versions: StandingVersions
    picture: ControllerPicture
    succeeds: bool  # the picture is a predecessor's: the cluster is not being started


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


def beginning(seen: Sequence[ExpertActorStatus], *, first: ControllerPicture, checkpoint: str) -> Beginning:
    """What the actors keep of a predecessor; seen is sorted by placement numbers. first, and checkpoint, are what a
    cluster is started with."""
    term, generation = seen[-1].placement if seen else (0, 0)
    found = _newest_picture(seen)
    return Beginning(
        term=term + 1,
        generation=generation if generation < MAX_NUMBER // 2 else 0,  # a higher term may count anew
        versions=_versions_of(found) or _served_version(seen, checkpoint),
        picture=found or first,
        succeeds=found is not None,
    )


def _versions_of(picture: ControllerPicture | None) -> StandingVersions | None:
    if picture is None or not picture.versions:
        return None
    return StandingVersions(
        all=picture.versions, weight_version=picture.weight_version, last_version=picture.last_weight_version
    )


def _served_version(seen: Sequence[ExpertActorStatus], checkpoint: str) -> StandingVersions:
    """Where no picture says which version stands: what the actors serve, or the first."""
    version = max((status.weight_version for status in seen), default=0) or 1
    told = seen[-1].checkpoint if seen else ""
    return StandingVersions.only(WeightVersion(version=version, checkpoint=told or checkpoint))


def _newest_picture(seen: Sequence[ExpertActorStatus]) -> ControllerPicture | None:
    """The picture of the highest placement number that can be read; seen is sorted by that."""
    for status in reversed(seen):
        if status.picture:
            try:
                return decode_picture(status.picture)
            except InvalidMessage as exc:
                logger.warning("the picture that %s keeps cannot be read: %s", status.actor, exc)
    return None
