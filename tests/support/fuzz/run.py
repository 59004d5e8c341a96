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

CPU_LIMIT_S = 5.0  # of one input: it computes without end
WALL_LIMIT_S = 120.0  # of one input: it waits without end; a busy machine takes long for little
MAX_GROWTH_BYTES = 48 * 2**20  # of the process, over all inputs but the first
MAX_INPUT_BYTES = 512


class Found(AssertionError):
    """An input does what none may do. Names it in hexadecimal digits, so that a test can repeat it."""


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Context: errors of threads are collected in the list, and one input's limits can be set. In the main thread."""
    died: list[str] = []

    def note(error: threading.ExceptHookArgs) -> None:
        if error.exc_type is not SystemExit:
            died.append(f"{error.exc_type.__name__}: {error.exc_value}")

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("CPU" if number == signal.SIGPROF else "time")

    hook, threading.excepthook = threading.excepthook, note
    handlers = {number: signal.signal(number, too_long) for number in (signal.SIGPROF, signal.SIGALRM)}
    timer_s, _ = signal.getitimer(signal.ITIMER_REAL)  # pytest's, of the whole test
    began_s = time.monotonic()
    try:
        yield died
    finally:
        threading.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if timer_s:
            signal.setitimer(signal.ITIMER_REAL, max(timer_s - (time.monotonic() - began_s), 1.0))


def run_one(target: Target, data: bytes, died: list[str]) -> None:
    """Runs the target on one input. Raises Found if an error but a MoeClusterError leaves it, or it does not end."""
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, WALL_LIMIT_S)
    try:
        target(data)
    except MoeClusterError:
        pass
    except TimeoutError as exc:
        raise Found(f"too much {exc}: {data.hex()}") from exc
    except Exception as exc:
        raise Found(f"{type(exc).__name__}: {exc}: {data.hex()}") from exc
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if died:
        raise Found(f"a thread died: {died[0]}: {data.hex()}")


def run_many(target: Target, count: int, *, seed: int = 0) -> None:
    """Runs the target on so many inputs, the same for a seed. Raises Found, also if the process keeps growing."""
    rng = random.Random(seed)
    with watched() as died:
        before_bytes = 0
        for number in range(count):
            if number == count // 4:  # until then, code and caches are loaded
                before_bytes = _resident_bytes()
            run_one(target, rng.randbytes(rng.randrange(MAX_INPUT_BYTES)), died)
    grown_bytes = _resident_bytes() - before_bytes
    if grown_bytes > MAX_GROWTH_BYTES:
        raise Found(f"{count} inputs left {grown_bytes} bytes behind")


def repeat(target: Target, inputs: Any) -> None:
    """Runs the target on inputs that once did what none may do, as hexadecimal digits."""
    with watched() as died:
        for digits in inputs:
            run_one(target, bytes.fromhex(digits), died)


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
