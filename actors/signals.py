"""Signals that end a command: all as SystemExit, so that what it started is ended; and none of them amid that."""

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
    """SIGTERM and SIGHUP end what runs within by SystemExit with 128 and their number, as SIGINT does by
    KeyboardInterrupt. What nohup ignores stays ignored.

    Ray, where it waits, makes a SystemExit of its own out of ours, with the code 1: so the code is set here in the end.
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
