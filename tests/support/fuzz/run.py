"""Runs a target on one input, or on many that a seed gives: what may happen, how long it may take, what it may keep."""

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import psutil

from moecluster.errors import MoeClusterError

Target = Callable[[bytes], object]

CPU_LIMIT_S = 5.0  # of one input, in the thread that runs it: it computes without end
WALL_LIMIT_S = 120.0  # of one input: it waits without end; a busy machine takes long for little
MAX_GROWTH_BYTES = 48 * 2**20  # of the process, over all inputs but the first
MAX_INPUT_BYTES = 512


class Found(AssertionError):
    """An input does what none may do. Names it in hexadecimal digits, so that a test can repeat it."""


class Watch:
    """What is seen while inputs run: errors of threads, and one input's limits. In the main thread."""

    def __init__(self) -> None:
        self.died: list[str] = []
        self._until_cpu_s = 0.0

    def begin(self) -> None:
        """Begins the limits of one input."""
        self._until_cpu_s = time.thread_time() + CPU_LIMIT_S
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        signal.setitimer(signal.ITIMER_REAL, WALL_LIMIT_S)

    def end(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def note(self, error: threading.ExceptHookArgs) -> None:
        if error.exc_type is not SystemExit:
            self.died.append(f"{error.exc_type.__name__}: {error.exc_value}")

    def too_long(self, number: int, frame: FrameType | None) -> None:
        left_s = self._until_cpu_s - time.thread_time() if number == signal.SIGPROF else 0.0
        if left_s <= 0:
            raise TimeoutError("CPU" if number == signal.SIGPROF else "time")
        signal.setitimer(signal.ITIMER_PROF, left_s)  # which counts every thread: others computed


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Context: errors of threads are collected, and one input's limits can be set. In the main thread."""
    watch = Watch()
    hook, threading.excepthook = threading.excepthook, watch.note
    handlers = {number: signal.signal(number, watch.too_long) for number in (signal.SIGPROF, signal.SIGALRM)}
    timer_s, _ = signal.getitimer(signal.ITIMER_REAL)  # pytest's, of the whole test
    began_s = time.monotonic()
    try:
        yield watch
    finally:
        threading.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if timer_s:
            signal.setitimer(signal.ITIMER_REAL, max(timer_s - (time.monotonic() - began_s), 1.0))


def run_one(target: Target, data: bytes, watch: Watch) -> None:
    """Runs the target on one input. Raises Found if an error but a MoeClusterError leaves it, or it does not end."""
    watch.begin()
    try:
        target(data)
    except MoeClusterError:
        pass
    except TimeoutError as exc:
        raise Found(f"too much {exc}: {data.hex()}") from exc
    except Exception as exc:
        raise Found(f"{type(exc).__name__}: {exc}: {data.hex()}") from exc
    finally:
        watch.end()
    if watch.died:
        raise Found(f"a thread died: {watch.died[0]}: {data.hex()}")


def run_many(target: Target, count: int, *, seed: int = 0) -> None:
    """Runs the target on so many inputs, the same for a seed. Raises Found, also if the process keeps growing."""
    rng = random.Random(seed)
    with watched() as watch:
        before_bytes = 0
        for number in range(count):
            if number == count // 4:  # until then, code and caches are loaded
                before_bytes = _resident_bytes()
            run_one(target, rng.randbytes(rng.randrange(MAX_INPUT_BYTES)), watch)
    grown_bytes = _resident_bytes() - before_bytes
    if grown_bytes > MAX_GROWTH_BYTES:
        raise Found(f"{count} inputs left {grown_bytes} bytes behind")


def repeat(target: Target, inputs: Any) -> None:
    """Runs the target on inputs that once did what none may do, as hexadecimal digits."""
    with watched() as watch:
        for digits in inputs:
            run_one(target, bytes.fromhex(digits), watch)


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
