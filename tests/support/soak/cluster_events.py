"""Events of a cluster during a test: what the test did to it, and what it did by itself."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from moecluster.types import Operation, OperationPhase


@dataclass(frozen=True, kw_only=True)
class ClusterEvent:
    """An operation or a kill, until its effects are over. Times by time.monotonic."""

    kind: str
    what: str
    begun_s: float
    ended_s: float
    failure: str = ""  # of an operation; empty: it was done
    amid: str = ""  # of a kill: the kind of operation that it interrupted

    def overlaps(self, begun_s: float, ended_s: float) -> bool:
        return self.begun_s < ended_s and begun_s < self.ended_s


def unordered(operations: Iterable[Operation]) -> list[ClusterEvent]:
    """Returns the controller's automatic operations as events. Their times, converted from the wall clock, are exact
    to a few milliseconds."""
    offset_s = time.monotonic() - time.time()
    return [
        ClusterEvent(
            kind=f"{o.kind} by itself",
            what=o.reason,
            begun_s=o.created_s + offset_s,
            ended_s=o.ended_s + offset_s,
            failure="" if o.phase is OperationPhase.DONE else o.detail,
        )
        for o in operations
        if o.ended_s is not None
    ]
