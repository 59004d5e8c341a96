"""Signals that end a command: all as SystemExit, so that what it started is ended; and none of them amid that."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_BY_EXIT_CODE = {128 + number: number.name for number in ENDING}


def end_by_signals() -> None:
    """SIGTERM and SIGHUP end this process by SystemExit, as SIGINT does by KeyboardInterrupt. What nohup ignores stays
    ignored."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))


def signal_of(code: object) -> str:
    """The name of the signal that an exit code stands for; empty if there is none."""
    return _BY_EXIT_CODE.get(code, "") if isinstance(code, int) else ""


@contextmanager
def undisturbed() -> Iterator[None]:
    """A second Ctrl-C, or what supervisors send twice, leaves no half of a cluster behind. Only for what ends soon."""
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
    """Signals that come meanwhile take effect afterwards, by the handlers from before. Ray, joined, sets its own: they
    print a stack of C++, or end the process with another exit code."""
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
