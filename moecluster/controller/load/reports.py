"""What the expert actors last said of themselves: their work, what an expert weighs, what they could not load."""

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
    """How hard the actors work."""

    busy_share: float  # mean over the actors, 0 to 1
    queue_s: float  # mean wait of a message; 0 without messages


class ActorReports:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, _Report] = {}
        self._before: dict[str, _Report] = {}  # as `pressure` saw them
        self._expert_bytes = 1.0
        self._not_prepared: dict[str, tuple[int, MoeClusterError]] = {}  # weight version, and why it is not loaded

    def add(self, status: ExpertActorStatus, now_s: float) -> None:
        """An actor answered."""
        with self._lock:
            self._last[status.actor] = _Report(now_s=now_s, status=status)
            held = len(status.experts) + sum(map(len, status.other_versions.values()))
            if held and status.hosted_bytes:
                self._expert_bytes = status.hosted_bytes / held

    def forget(self, actor: str) -> None:
        """The actor is lost, or gone."""
        with self._lock:
            self._last.pop(actor, None)
            self._before.pop(actor, None)

    def preparing_failed(self, actor: str, version: int, error: MoeClusterError) -> None:
        """The actor could not load a weight version that is being prepared."""
        with self._lock:
            self._not_prepared[actor] = (version, error)

    def prepared(self, actor: str) -> None:
        """The actor has loaded of a weight version that is being prepared."""
        with self._lock:
            self._not_prepared.pop(actor, None)

    def not_prepared(self, version: int) -> dict[str, MoeClusterError]:
        """Actors that could not load a weight version when they were last told to, and why."""
        with self._lock:
            return {actor: error for actor, (of, error) in sorted(self._not_prepared.items()) if of == version}

    def with_other_versions(self) -> list[str]:
        """Actors that held more weight versions than the one that they serve, when they last answered."""
        with self._lock:
            return sorted(actor for actor, report in self._last.items() if report.status.other_versions)

    def expert_bytes(self) -> float:
        """Of one expert, as an actor last had them on the average; 1 before any is known."""
        return self._expert_bytes

    def work(self) -> dict[str, ActorWork]:
        """Since the start of each actor's incarnation."""
        with self._lock:
            return {actor: report.status.work for actor, report in self._last.items()}

    def pressure(self) -> Pressure:
        """Since the last call, over the actors that have answered since then."""
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
