"""The weight versions that a router holds: each with its own trunk, over experts of the same version.

A request keeps the version that it started with. The versions follow the placement: the router loads the trunk of the
next version beside the current one, so that the switch only affects which one new requests use. It keeps the old one
while the placement names it, since requests that another router started with it may continue here.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.dispatch.trunk_backend import TrunkBackend
from moecluster.errors import MoeClusterError, StaleRequest, Unavailable
from moecluster.memory import return_freed_memory
from moecluster.types import Placement, PlacementNumber

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT")

POLL_S = 0.5  # between checks for trunks to close
RETRY_S = 5.0  # before a trunk that could not be loaded is tried again
SETTLE_TIMEOUT_S = 60.0  # longest wait of a new request for the version that is served


@dataclass(frozen=True, kw_only=True)
class VersionsInUse:
    """What a router reports to the controller about its weights."""

    newest: int  # that new requests are generated with; 0: not known yet
    oldest: int  # that a running request still uses, or the newest
    ready: int  # the newest whose trunk is loaded
    failed: int  # whose trunk could not be loaded; 0: none
    problem: str  # why


class _Loaded(Generic[ModelT]):
    """A version with its trunk, and how many requests use it."""

    def __init__(self, path: Path, backend: TrunkBackend, model: ModelT) -> None:
        self.path = path
        self.backend = backend
        self.model = model
        self.uses = 0

    @property
    def version(self) -> int:
        return self.backend.version


class ModelUse(Generic[ModelT]):
    """A request's hold on the version that it is generated with. A context manager; any thread may release it."""

    def __init__(self, loaded: _Loaded[ModelT], release: Callable[[_Loaded[ModelT]], None]) -> None:
        self.model = loaded.model
        self.path = loaded.path
        self._loaded = loaded
        self._release = release
        self._lock = threading.Lock()
        self._is_released = False

    @property
    def version(self) -> int:
        """The weight version; 0 before the controller has named one."""
        return self._loaded.version

    def release(self) -> None:
        """Ends the hold. Idempotent."""
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
        self._release(self._loaded)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class ModelVersions(Generic[ModelT]):
    """Loads the trunks that the placement names and closes unused ones. Thread-safe; ends with close()."""

    def __init__(
        self,
        path: str | Path,
        experts: RemoteExperts,
        *,
        load: Callable[[Path, TrunkBackend], ModelT],
        close: Callable[[ModelT], None] = lambda model: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Loads the first trunk; the first placement says which version it is. Raises what load raises.

        load: loads a directory's model over its experts; called by one thread at a time, while others generate.
        close: closes such a model after its last request. on_change: called when the versions in use have changed.
        """
        self._experts = experts
        self._load = load
        self._close = close
        self._on_change = on_change
        self._changed = threading.Condition()
        self._current = self._loaded(Path(path), 0)
        self._next: _Loaded[ModelT] | None = None
        self._retired: list[_Loaded[ModelT]] = []  # running requests may still use them
        self._old = 0  # the version of requests that may still come from other routers; 0: none
        self._failed = 0  # the version whose trunk could not be loaded last
        self._problem = ""  # and why
        self._is_settled = False  # a placement has confirmed the version of new requests
        self._not_before_s = 0.0  # earliest retry of a load that failed
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model-versions", daemon=True)
        self._thread.start()

    def use(self, timeout_s: float = SETTLE_TIMEOUT_S, *, version: int = 0) -> ModelUse[ModelT]:
        """Returns the version for a new request, or the named one; it stays loaded until the use is released.

        Waits until a router that has just started knows which version is served. Raises Unavailable after the timeout,
        and StaleRequest if the named version is not loaded here.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_settled or self._closed.is_set(), timeout_s):
                why = f": {self._problem}" if self._problem else ": no controller has said so yet"
                raise Unavailable(f"the router does not know within {timeout_s:g} s what is served{why}")
            loaded = self._held(version)
            loaded.uses += 1
            begun = loaded.uses == 1 and loaded is not self._current
        if begun:
            self._on_change()
        return ModelUse(loaded, self._released)

    @property
    def current(self) -> tuple[Path, ModelT]:
        """Directory and trunk of new requests, without holding it."""
        with self._changed:
            return self._current.path, self._current.model

    def in_use(self) -> VersionsInUse:
        """Never waits for a load."""
        with self._changed:
            known = self._is_settled
            used = [loaded.version for loaded in self._retired if loaded.uses]
            ready = [self._current.version, *([self._next.version] if self._next is not None else [])]
            return VersionsInUse(
                newest=self._current.version if known else 0,
                oldest=min([self._current.version, *used]) if known else 0,
                ready=max(ready) if known else 0,
                failed=self._failed,
                problem=self._problem,
            )

    def reload(self, path: str | Path) -> None:
        """Loads another directory of the same version for new requests: training went on. Raises what load raises."""
        with self._changed:
            version = self._current.version
        loaded = self._loaded(Path(path), version)
        with self._changed:
            if self._current.version == version:
                loaded = self._replace_current(loaded)
            self._retired.append(loaded)

    def close(self) -> None:
        """Stops following the placement and closes all trunks, even those that requests still use."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(POLL_S + 5.0)
        with self._changed:
            idle = [loaded for loaded in (*self._retired, self._current, self._next) if loaded is not None]
            self._retired, self._next = [], None
        for loaded in idle:
            self._close(loaded.model)

    # -- the thread --

    def _run(self) -> None:
        number: PlacementNumber | None = None
        while not self._closed.is_set():
            try:
                placement = self._experts.pool.placement(POLL_S)
                if placement.number != number or self._failed:
                    number = placement.number if self._follow(placement) else None
                self._experts.pool.wait_for_change(placement.number, POLL_S)
            except Unavailable:
                self._closed.wait(POLL_S / 10)  # no placement yet, or the client is closed
            self._close_idle()

    def _follow(self, placement: Placement) -> bool:
        """Takes the versions that the placement names. Returns False if it must be called again later."""
        with self._changed:
            self._old = placement.old_weight_version
        published, following = placement.weight_version, placement.next_weight_version
        if not self._is_settled and (not published or _same(placement.checkpoint, self._current.path)):
            with self._changed:
                self._current.backend.version = published
                self._settle()
        if published and published != self._current.version and not self._take(published, placement.checkpoint):
            return False
        if not following:
            with self._changed:
                unused, self._next, self._failed, self._problem = self._next, None, 0, ""
                self._retired += [unused] if unused is not None else []
            return True
        return self._prepare(following, placement.next_checkpoint)

    def _take(self, version: int, checkpoint: str) -> bool:
        """Switches new requests to a version, which is loaded already unless this router missed its preparation."""
        if not self._prepare(version, checkpoint):
            return False
        with self._changed:
            loaded, self._next = self._next, None
            assert loaded is not None
            self._retired.append(self._replace_current(loaded))
            self._settle()
        return True

    def _prepare(self, version: int, checkpoint: str) -> bool:
        """Loads a version beside the current one. Returns False if that failed, or if it is too early to retry."""
        with self._changed:
            if self._next is not None and self._next.version == version:
                return True
            kept = next((loaded for loaded in self._retired if loaded.version == version), None)
            if kept is not None:  # requests are still generated with it
                self._retired.remove(kept)
            unused, self._next = self._next, kept
            self._retired += [unused] if unused is not None else []
        if kept is not None:
            return True
        if version == self._failed and time.monotonic() < self._not_before_s:
            return False
        try:
            loaded = self._loaded(Path(checkpoint), version)
        except Exception as exc:  # from the disk, torch or a family's own code: requests of the old version continue
            log = logger.warning if isinstance(exc, MoeClusterError) else logger.exception
            log("the trunk of weight version %d is not loaded: %s", version, exc)
            with self._changed:
                self._failed, self._problem = version, str(exc) if isinstance(exc, MoeClusterError) else repr(exc)
            self._not_before_s = time.monotonic() + RETRY_S
            self._on_change()
            return False
        with self._changed:
            self._next, self._failed, self._problem = loaded, 0, ""
        self._on_change()
        return True

    def _held(self, version: int) -> _Loaded[ModelT]:
        """Returns a version, or the current one for 0. Called with the lock held. Raises StaleRequest."""
        if version in (0, self._current.version):
            return self._current
        others = (*reversed(self._retired), *([self._next] if self._next is not None else []))
        for loaded in others:
            if loaded.version == version:
                return loaded
        raise StaleRequest(f"weight version {version} is not held here: {self._current.version} is served")

    def _loaded(self, path: Path, version: int) -> _Loaded[ModelT]:
        backend = TrunkBackend(self._experts, version)
        return _Loaded(path, backend, self._load(path, backend))

    def _replace_current(self, loaded: _Loaded[ModelT]) -> _Loaded[ModelT]:
        """Returns the one that was current. Called with the lock held."""
        before, self._current = self._current, loaded
        return before

    def _settle(self) -> None:
        """Lets new requests start. Called with the lock held."""
        self._is_settled = True
        self._changed.notify_all()
        self._on_change()

    def _released(self, loaded: _Loaded[ModelT]) -> None:
        with self._changed:
            loaded.uses -= 1
            ended = not loaded.uses and loaded is not self._current
        if ended:
            self._on_change()

    def _close_idle(self) -> None:
        """Closes unused trunks. Runs in this object's thread: a request's thread must not wait for other requests'
        threads."""
        with self._changed:
            kept = [loaded for loaded in self._retired if loaded.uses or loaded.version == self._old != 0]
            idle = [loaded for loaded in self._retired if loaded not in kept]
            self._retired = kept
        for loaded in idle:
            self._close(loaded.model)
        if idle:
            del idle, loaded
            return_freed_memory()


def _same(checkpoint: str, path: Path) -> bool:
    return os.path.realpath(checkpoint) == os.path.realpath(path)
