"""The snapshot that a controller leaves with its actors, and what its successor reads from them before any request."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

from moecluster.controller.signals import Signals
from moecluster.controller.state.cluster_state import ClusterState
from moecluster.controller.state.operation_log import OperationLog
from moecluster.controller.state.weight_versions import WeightVersions
from moecluster.errors import InvalidMessage
from moecluster.growing import MAX_NUMBER
from moecluster.rpc.controller.snapshot import ControllerSnapshot, decode_snapshot, encode_snapshot
from moecluster.types import NO_PLACEMENT, ExpertActorStatus, WeightVersion

OPERATIONS_IN_SNAPSHOT = 64
logger = logging.getLogger(__name__)
READ_TIMEOUT_S = 10.0  # for an actor's answer
READ_GRACE_S = 2.0  # for the others once one has answered: a starting actor has no state to report
MAX_READS_AT_ONCE = 32


class KeptSnapshot:
    """The encoded snapshot, encoded again on demand after a change. Thread-safe."""

    def __init__(self, cluster_state: ClusterState, log: OperationLog, signals: Signals) -> None:
        self._cluster_state = cluster_state
        self._log = log
        self._lock = threading.Lock()
        self._outdated = True
        self._encoded = b""
        signals.changed.listen(self._outdate)

    def encoded(self) -> bytes:
        """Returns the encoded snapshot of the current state."""
        with self._lock:
            if self._outdated:
                self._outdated = False  # before encoding, so that a change meanwhile outdates it again
                self._encoded = encode_snapshot(self._now())
            return self._encoded

    def _outdate(self) -> None:
        self._outdated = True  # without the lock: the caller may hold a lock that encoding waits for

    def _now(self) -> ControllerSnapshot:
        actors, versions = self._cluster_state.actors, self._cluster_state.versions
        return ControllerSnapshot(
            actors=actors,
            leaving=tuple(sorted(self._cluster_state.leaving)),
            replicas=tuple(r for r in self._cluster_state.replicas() if r.actor in actors),
            operations=self._log.for_successor(OPERATIONS_IN_SNAPSHOT),
            cold=tuple(sorted(self._cluster_state.cold)),
            versions=versions.all,
            weight_version=versions.weight_version,
            last_weight_version=versions.last_version,
        )


@dataclass(frozen=True, kw_only=True)
class InitialState:
    """The state that a controller starts with."""

    term: int  # higher than every actor has seen
    generation: int
    versions: WeightVersions
    snapshot: ControllerSnapshot
    succeeds: bool  # the snapshot is a predecessor's, not that of a new cluster


def read_actors(read: Callable[[str], ExpertActorStatus | None], actors: Sequence[str]) -> list[ExpertActorStatus]:
    """Returns the status of every actor that answers, sorted by placement number. read returns within READ_TIMEOUT_S;
    None: no answer."""
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


def initial_state(seen: Sequence[ExpertActorStatus], *, first: ControllerSnapshot, checkpoint: str) -> InitialState:
    """Returns the predecessor's state, as far as the actors keep it. seen is sorted by placement number. first and
    checkpoint are those of a new cluster."""
    term, generation = seen[-1].placement if seen else NO_PLACEMENT
    found = _newest_snapshot(seen)
    return InitialState(
        term=term + 1,
        generation=generation if generation < MAX_NUMBER // 2 else 0,  # a higher term may start again from 0
        versions=_versions_of(found) or _served_version(seen, checkpoint),
        snapshot=found or first,
        succeeds=found is not None,
    )


def _versions_of(snapshot: ControllerSnapshot | None) -> WeightVersions | None:
    if snapshot is None or not snapshot.versions:
        return None
    return WeightVersions(
        all=snapshot.versions, weight_version=snapshot.weight_version, last_version=snapshot.last_weight_version
    )


def _served_version(seen: Sequence[ExpertActorStatus], checkpoint: str) -> WeightVersions:
    """The version if no snapshot names one: the newest that an actor serves, or the first."""
    version = max((status.weight_version for status in seen), default=0) or 1
    checkpoint_of_actor = seen[-1].checkpoint if seen else ""
    return WeightVersions.only(WeightVersion(version=version, checkpoint=checkpoint_of_actor or checkpoint))


def _newest_snapshot(seen: Sequence[ExpertActorStatus]) -> ControllerSnapshot | None:
    """Returns the readable snapshot with the highest placement number; seen is sorted by that."""
    for status in reversed(seen):
        if status.snapshot:
            try:
                return decode_snapshot(status.snapshot)
            except InvalidMessage as exc:
                logger.warning("the snapshot that %s keeps cannot be read: %s", status.actor, exc)
    return None
