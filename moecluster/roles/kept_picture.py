"""What the controller leaves with its actors for its successor."""

import threading

from moecluster.roles.operation_log import OperationLog
from moecluster.roles.standing import Standing
from moecluster.rpc.picture import ControllerPicture, encode_picture

OPERATIONS_IN_PICTURE = 64


class KeptPicture:
    """The picture as bytes, made anew when it is asked for after a change. Thread-safe."""

    def __init__(self, standing: Standing, log: OperationLog) -> None:
        self._standing = standing
        self._log = log
        self._lock = threading.Lock()
        self._outdated = True
        self._encoded = b""

    def outdate(self) -> None:
        """Something has changed."""
        self._outdated = True  # without the lock: whoever calls may hold the one that making a picture waits for

    def encoded(self) -> bytes:
        """The picture of what stands now."""
        with self._lock:
            if self._outdated:
                self._outdated = False  # first: what changes while it is made makes it anew
                self._encoded = encode_picture(self._now())
            return self._encoded

    def _now(self) -> ControllerPicture:
        actors, versions = self._standing.actors, self._standing.versions
        return ControllerPicture(
            actors=actors,
            leaving=tuple(sorted(self._standing.leaving)),
            replicas=tuple(r for r in self._standing.replicas() if r.actor in actors),
            operations=self._log.for_successor(OPERATIONS_IN_PICTURE),
            cold=tuple(sorted(self._standing.cold)),
            versions=versions.all,
            weight_version=versions.weight_version,
            last_weight_version=versions.last_version,
        )
