"""The expert actors' last status reports: their work, the bytes of an expert, and what they could not load."""

import threading
from collections.abc import Collection
from dataclasses import dataclass

from moecluster.errors import MoeClusterError
from moecluster.types import ActorWork, ExpertActorStatus


@dataclass(frozen=True, kw_only=True)
class _Report:
    now_s: float
    status: ExpertActorStatus


@dataclass(frozen=True, kw_only=True)
class _Interval:
    """What an actor did between two of its reports."""

    busy_share: float
    queue_wait_s: float
    batches: int


@dataclass(frozen=True, kw_only=True)
class Pressure:
    """Utilization of the actors that have reported lately."""

    busy_share: float  # mean over the actors, 0 to 1
    queue_s: float  # mean wait of a message in the queue; 0 without messages
    silent: int  # actors that have not reported lately, about which nothing is known


class ActorReports:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, _Report] = {}
        self._before: dict[str, _Report] = {}  # that `pressure` compares the next one with
        self._intervals: dict[str, _Interval] = {}  # the last one of each actor
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
            self._intervals.pop(actor, None)

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

    def pressure(self, actors: Collection[str], *, now_s: float, max_age_s: float) -> Pressure:
        """Returns the utilization of these actors between their last two reports. Silence is no report: an actor whose
        last one is older than max_age_s, or the only one of its incarnation, counts as silent, not as idle."""
        with self._lock:
            for actor, report in self._last.items():
                self._compare(actor, report)
            found = [
                self._intervals[actor]
                for actor in actors
                if actor in self._intervals and now_s - self._last[actor].now_s <= max_age_s
            ]
        batches = sum(interval.batches for interval in found)
        return Pressure(
            busy_share=sum(interval.busy_share for interval in found) / len(found) if found else 0.0,
            queue_s=sum(interval.queue_wait_s for interval in found) / batches if batches else 0.0,
            silent=len(actors) - len(found),
        )

    def _compare(self, actor: str, report: _Report) -> None:
        before = self._before.get(actor)
        if before is not None and report.now_s <= before.now_s:
            return  # nothing new: the last interval still holds
        self._before[actor] = report
        self._intervals.pop(actor, None)
        if before is None or before.status.incarnation != report.status.incarnation:
            return
        then, now = before.status.work, report.status.work
        self._intervals[actor] = _Interval(
            busy_share=min((now.busy_s - then.busy_s) / (report.now_s - before.now_s), 1.0),
            queue_wait_s=now.queue_wait_s - then.queue_wait_s,
            batches=now.batches - then.batches,
        )
