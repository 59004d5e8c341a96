"""Signals that end a command: turned into SystemExit, so that it cleans up; and held off while it does."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_BY_EXIT_CODE = {128 + number: number.name for number in ENDING}


@contextmanager
def end_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit with 128 plus their number, as SIGINT raises KeyboardInterrupt. Signals that
    nohup ignores stay ignored.

    Ray, while it waits, replaces our SystemExit by its own with code 1: so the code is set again at the end.
    """
    received: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        received.append(number)
        sys.exit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    except SystemExit:
        if received:
            sys.exit(128 + received[0])
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signal_of(code: object) -> str:
    """Returns the name of the signal that an exit code stands for; empty if none."""
    return _BY_EXIT_CODE.get(code, "") if isinstance(code, int) else ""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignores further signals, so that a second Ctrl-C does not interrupt a clean-up. Only for what ends soon."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_later() -> Iterator[None]:
    """Delays signals until afterwards, and restores the handlers from before. When joined, Ray sets its own, which
    print a C++ stack or end the process with another exit code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
