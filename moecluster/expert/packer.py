"""Packs expert weights into the CPU's preferred layout; large experts serve unpacked until that is done.

Packing takes longer than reading a checkpoint, and a plain weight gives the same results: in bfloat16 bit for bit, in
float32 within rounding. So packing waits for the load to end, not the other way round. In batch-invariant mode not even
rounding may change while an expert serves: there each expert is packed before it is served.
"""

import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from moecluster.hf.shard import ExpertShard
from moecluster.memory import RETURN_EVERY_BYTES, return_freed_memory
from moecluster.moe.experts.base import Expert
from moecluster.moe.linear import pack

AT_ONCE_BYTES = 2 * 2**20  # packing experts up to this size takes no noticeable time
NICENESS = 10  # computing and reading go first
JOIN_TIMEOUT_S = 10.0
POLL_S = 0.01

Packable = Expert | ExpertShard


class Packer:
    """Packs in one thread, started with the first large expert. Holds only weak references: unloaded experts are
    freed."""

    def __init__(self, name: str, *, always_at_once: bool) -> None:
        self._name = name
        self._always_at_once = always_at_once
        self._waiting: queue.SimpleQueue[weakref.ref[Packable] | None] = queue.SimpleQueue()
        self._left = 0  # experts queued or being packed
        self._loads = 0  # running loads, which get the cores and the memory bandwidth
        self._may_pack = threading.Event()
        self._may_pack.set()
        self._lock = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def take(self, module: nn.Module) -> None:
        """Packs an expert that is served and not trained: now if it is small, else in the background while it
        serves."""
        if not isinstance(module, Expert | ExpertShard):
            return  # an expert kind registered by a user
        if self._always_at_once or sum(p.nbytes for p in module.parameters()) <= AT_ONCE_BYTES:
            module.pack()
            return
        with self._lock:
            if self._closed:
                return
            self._left += 1
            self._waiting.put(weakref.ref(module))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"pack-{self._name}", daemon=True)
                self._thread.start()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Pauses background packing during a load."""
        with self._lock:
            self._loads += 1
            if not self._closed:  # else the ending thread would wait for this load
                self._may_pack.clear()
        try:
            yield
        finally:
            with self._lock:
                self._loads -= 1
                if not self._loads:
                    self._may_pack.set()

    def wait(self, timeout_s: float) -> bool:
        """Waits until all experts taken are packed; returns whether that is so within the timeout."""
        deadline_s = time.monotonic() + timeout_s
        while self._left and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        return not self._left

    def close(self) -> None:
        """Stops packing; weights not packed yet stay plain."""
        with self._lock:
            self._closed = True
            self._may_pack.set()
            thread = self._thread
        self._waiting.put(None)
        if thread is not None:
            thread.join(JOIN_TIMEOUT_S)

    def _run(self) -> None:
        if sys.platform == "linux":  # where threads have priorities of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        freed_bytes = 0  # since freed memory was returned
        while (waiting := self._waiting.get()) is not None:  # close() ends it
            self._may_pack.wait()  # until no load runs, or close()
            module = waiting()
            if module is not None:
                freed_bytes += self._pack(module)
            del module
            if freed_bytes >= RETURN_EVERY_BYTES or self._waiting.empty():
                return_freed_memory()
                freed_bytes = 0
            with self._lock:
                self._left -= 1

    def _pack(self, module: Packable) -> int:
        """Packs one weight after another, so that only one exists twice. A running computation uses either the plain or
        the packed one. Returns the bytes of the plain weights that were replaced."""
        freed_bytes = 0
        for owner, name in module.packable():
            self._may_pack.wait()  # as in _run
            if self._closed:
                break
            value: nn.Parameter = getattr(owner, name)
            packed = pack(value)
            setattr(owner, name, packed)
            freed_bytes += value.nbytes
        return freed_bytes
