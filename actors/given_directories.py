"""The directories that a cluster may read, kept in Ray's internal key-value store, behind Ray's own authentication.

Every process of the cluster reads them there, including one that Ray has restarted.
"""

import os

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # as in Ray Serve: no public API stores a value
from ray.exceptions import RayError

from actors.ray_calls import last_line
from moecluster.errors import Unavailable
from moecluster.models.given_directories import is_within

KEPT = b"1"  # only the keys matter
KV_NAMESPACE = b"moecluster-given-directories"
TIMEOUT_S = 5.0


class GivenDirectories:
    """The given directories of one cluster; an IsGiven. Thread-safe. This process must have joined Ray."""

    def __init__(self, cluster: str) -> None:
        self._prefix = f"{cluster}\0".encode()
        self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        self._known: frozenset[str] = frozenset()  # as last read; these need no new request

    def give(self, directory: str) -> None:
        """Allows the cluster to read this directory and everything below it. Raises Unavailable."""
        # Under both names: a node that does not see the directory cannot resolve its links.
        for name in {os.path.abspath(directory), os.path.realpath(directory)}:
            key = self._prefix + os.fsencode(name)
            try:
                self._gcs.internal_kv_put(key, KEPT, True, KV_NAMESPACE, timeout=TIMEOUT_S)
            except (RayError, RuntimeError) as exc:
                raise Unavailable(f"Ray does not take note of {directory}: {last_line(exc)}") from exc

    def forget_all(self) -> None:
        """Removes all, for a cluster that has ended or whose name is reused. Raises Unavailable."""
        try:
            self._gcs.internal_kv_del(self._prefix, True, KV_NAMESPACE, timeout=TIMEOUT_S)
        except (RayError, RuntimeError) as exc:
            raise Unavailable(f"Ray does not forget the directories of a cluster: {last_line(exc)}") from exc

    def __call__(self, path: str) -> bool:
        """Returns whether this directory, or one above it, was given. Raises Unavailable if Ray does not answer."""
        if is_within(path, self._known):
            return True
        try:
            keys = self._gcs.internal_kv_keys(self._prefix, KV_NAMESPACE, timeout=TIMEOUT_S)
        except (RayError, RuntimeError) as exc:
            raise Unavailable(f"Ray does not say which directories were given: {last_line(exc)}") from exc
        self._known = frozenset(os.fsdecode(key[len(self._prefix) :]) for key in keys)
        return is_within(path, self._known)
