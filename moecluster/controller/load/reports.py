"""The expert actors' last status reports: their work, the bytes of an expert, and what they could not load."""

import threading
from dataclasses import dataclass

from moecluster.errors import MoeClusterError
from moecluster.types import ActorWork, ExpertActorStatus


@dataclass(frozen=True, kw_only=True)
class _Report:
    now_s: float
    status: ExpertActorStatus


@dataclass(frozen=True, kw_only=True)
class Pressure:
    """Utilization of the actors."""

    busy_share: float  # mean over the actors, 0 to 1
    queue_s: float  # mean wait of a message in the queue; 0 without messages


class ActorReports:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, _Report] = {}
        self._before: dict[str, _Report] = {}  # at the last call of `pressure`
        self._expert_bytes = 1.0
        self._not_prepared: dict[str, tuple[int, MoeClusterError]] = {}  # actor -> (weight version, why not)

    def add(self, status: ExpertActorStatus, now_s: float) -> None:
        """Stores an actor's status."""
        with self._lock:
            self._last[status.actor] = _Report(now_s=now_s, status=status)
            held = len(status.experts) + sum(map(len, status.other_versions.values()))
            if held and status.hosted_bytes:
                self._expert_bytes = status.hosted_bytes / held

    def forget(self, actor: str) -> None:
        """Forgets an actor that is lost or removed."""
        with self._lock:
            self._last.pop(actor, None)
            self._before.pop(actor, None)

    def preparing_failed(self, actor: str, version: int, error: MoeClusterError) -> None:
        """The actor could not load a weight version that is being prepared."""
        with self._lock:
            self._not_prepared[actor] = (version, error)

    def prepared(self, actor: str) -> None:
        """The actor has loaded experts of a weight version that is being prepared."""
        with self._lock:
            self._not_prepared.pop(actor, None)

    def not_prepared(self, version: int) -> dict[str, MoeClusterError]:
        """Returns the actors whose last attempt to load this weight version failed, and why."""
        with self._lock:
            return {actor: error for actor, (of, error) in sorted(self._not_prepared.items()) if of == version}

    def with_other_versions(self) -> list[str]:
        """Returns the actors that hold other weight versions beside the served one, by their last reports."""
        with self._lock:
            return sorted(actor for actor, report in self._last.items() if report.status.other_versions)

    def expert_bytes(self) -> float:
        """Bytes of one expert: the average on the actor that reported last; 1 before any report."""
        return self._expert_bytes

    def work(self) -> dict[str, ActorWork]:
        """Returns the work of each actor since its incarnation started."""
        with self._lock:
            return {actor: report.status.work for actor, report in self._last.items()}

    def pressure(self) -> Pressure:
        """Returns the utilization since the last call, over the actors that have reported since then."""
        with self._lock:
            before, last = self._before, dict(self._last)
            self._before = last
        shares, waited_s, batches = [], 0.0, 0
        for actor, report in last.items():
            earlier = before.get(actor)
            if earlier is None or earlier.status.incarnation != report.status.incarnation:
                continue
            seconds = report.now_s - earlier.now_s
            if seconds <= 0:
                continue
            then, now = earlier.status.work, report.status.work
            shares.append(min((now.busy_s - then.busy_s) / seconds, 1.0))
            waited_s += now.queue_wait_s - then.queue_wait_s
            batches += now.batches - then.batches
        return Pressure(
            busy_share=sum(shares) / len(shares) if shares else 0.0, queue_s=waited_s / batches if batches else 0.0
        )
