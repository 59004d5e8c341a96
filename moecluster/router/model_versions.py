"""The weight versions that a router has: each with its own trunk, and experts of the same version behind it.

A text is written to its end with the version that it was begun with. The versions follow the placement: the trunk of
the version that is next is loaded beside the one in use, so that the change is only that new texts take the other one.
The old one is kept while the placement names it: texts that another router began with it may go on here.
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
from moecluster.dispatch.trunk_backend import VersionExperts
from moecluster.errors import MoeClusterError, StaleOrder, Unavailable
from moecluster.memory import return_freed_memory
from moecluster.types import Placement

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT")

LOOK_S = 0.5  # between looks at what is to be closed
RETRY_S = 5.0  # before a trunk that could not be loaded is tried again
SETTLE_TIMEOUT_S = 60.0  # longest wait of a new text for the version that is served


@dataclass(frozen=True, kw_only=True)
class VersionsInUse:
    """What a router tells the controller of its weights."""

    newest: int  # that new texts are written with; 0: not known yet
    oldest: int  # that a text is still being written with, or the newest
    ready: int  # the newest whose trunk is loaded
    failed: int  # whose trunk could not be loaded; 0: none
    problem: str  # why


class _Loaded(Generic[ModelT]):
    """A version with its trunk, and how many texts use it."""

    def __init__(self, path: Path, backend: VersionExperts, model: ModelT) -> None:
        self.path = path
        self.backend = backend
        self.model = model
        self.uses = 0

    @property
    def version(self) -> int:
        return self.backend.version


class ModelUse(Generic[ModelT]):
    """A text's hold on the version that it is written with. Released once, from any thread; a context manager."""

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
        """The text has ended. Again is fine."""
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
    """Loads trunks as the placement asks, closes those that nobody uses. Thread-safe; ends with close()."""

    def __init__(
        self,
        path: str | Path,
        experts: RemoteExperts,
        *,
        load: Callable[[Path, VersionExperts], ModelT],
        close: Callable[[ModelT], None] = lambda model: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Loads the first trunk; which version it is of, the first placement tells. Raises what load raises.

        load: a directory and its experts to whatever texts are written with; called by one thread at a time, while
        others write texts. close: ends that, when the last text has ended. on_change: the versions in use have changed.
        """
        self._experts = experts
        self._load = load
        self._close = close
        self._on_change = on_change
        self._changed = threading.Condition()
        self._current = self._loaded(Path(path), 0)
        self._next: _Loaded[ModelT] | None = None
        self._retired: list[_Loaded[ModelT]] = []  # texts may still be written with them
        self._old = 0  # the version of texts that may still come from other routers; 0: none
        self._failed = 0  # the version whose trunk could not be loaded last
        self._problem = ""  # and why
        self._is_settled = False  # the current version is that of a placement, or was once
        self._not_before_s = 0.0  # of a load that failed
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model-versions", daemon=True)
        self._thread.start()

    def use(self, timeout_s: float = SETTLE_TIMEOUT_S, *, version: int = 0) -> ModelUse[ModelT]:
        """The version that a new text is to be written with, or the named one; it stays until the use is released.

        Waits while a router that has just started finds out what is served. Raises Unavailable after the timeout, and
        StaleOrder if the named version is not here.
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
        """Directory and trunk of new texts, without holding it."""
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
        """New texts take another directory, of the same version: training went on. Raises what load raises."""
        with self._changed:
            version = self._current.version
        loaded = self._loaded(Path(path), version)
        with self._changed:
            if self._current.version == version:
                loaded = self._replace_current(loaded)
            self._retired.append(loaded)

    def close(self) -> None:
        """Ends the following, and closes what no text uses; what is used still, its text closes no more."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(LOOK_S + 5.0)
        with self._changed:
            idle = [loaded for loaded in (*self._retired, self._current, self._next) if loaded is not None]
            self._retired, self._next = [], None
        for loaded in idle:
            self._close(loaded.model)

    # -- the thread --

    def _run(self) -> None:
        number = (-1, -1)
        while not self._closed.is_set():
            try:
                placement = self._experts.pool.placement(LOOK_S)
                if placement.number != number or self._failed:
                    number = placement.number if self._follow(placement) else (-1, -1)
                self._experts.pool.wait_for_change(placement.number, LOOK_S)
            except Unavailable:
                self._closed.wait(LOOK_S / 10)  # no placement yet, or the client is closed
            self._close_idle()

    def _follow(self, placement: Placement) -> bool:
        """Takes the versions that the placement names. False if there is more to do, later."""
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
        """Begins new texts with a version, which is loaded already unless this router was left out."""
        if not self._prepare(version, checkpoint):
            return False
        with self._changed:
            loaded, self._next = self._next, None
            assert loaded is not None
            self._retired.append(self._replace_current(loaded))
            self._settle()
        return True

    def _prepare(self, version: int, checkpoint: str) -> bool:
        """Loads a version beside the current one. False if it could not be loaded, or only tried later."""
        with self._changed:
            if self._next is not None and self._next.version == version:
                return True
            kept = next((loaded for loaded in self._retired if loaded.version == version), None)
            if kept is not None:  # texts are still written with it
                self._retired.remove(kept)
            unused, self._next = self._next, kept
            self._retired += [unused] if unused is not None else []
        if kept is not None:
            return True
        if version == self._failed and time.monotonic() < self._not_before_s:
            return False
        try:
            loaded = self._loaded(Path(checkpoint), version)
        except Exception as exc:  # of the disk, of torch, of a family's own code: the texts of the old version go on
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
        """A version, or (0) the current one. Under the lock. Raises StaleOrder."""
        if version in (0, self._current.version):
            return self._current
        others = (*reversed(self._retired), *([self._next] if self._next is not None else []))
        for loaded in others:
            if loaded.version == version:
                return loaded
        raise StaleOrder(f"weight version {version} is not held here: {self._current.version} is served")

    def _loaded(self, path: Path, version: int) -> _Loaded[ModelT]:
        backend = VersionExperts(self._experts, version)
        return _Loaded(path, backend, self._load(path, backend))

    def _replace_current(self, loaded: _Loaded[ModelT]) -> _Loaded[ModelT]:
        """Returns the one that was current. Under the lock."""
        before, self._current = self._current, loaded
        return before

    def _settle(self) -> None:
        """Under the lock."""
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
        """By the own thread: a text's thread that ends is not one to wait for texts' threads."""
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
