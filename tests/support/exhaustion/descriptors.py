"""A process without a free file descriptor: itself, until it closes some."""

import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ROOM = 16  # descriptors that are left until they are taken
AGAIN_S = 0.01


def _take_all(taken: list[int]) -> None:
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as exc:
        assert exc.errno == errno.EMFILE, exc


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Context: this process has none free; those that it closes meanwhile are taken at once."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    taken: list[int] = []
    ended = threading.Event()

    def keep_taking() -> None:
        while not ended.wait(AGAIN_S):
            _take_all(taken)

    taker = threading.Thread(target=keep_taking, name="takes-descriptors", daemon=True)
    taker.start()
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + ROOM, limits[1]))
    try:
        _take_all(taken)
        yield
    finally:
        ended.set()
        taker.join()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for each in taken:
            os.close(each)
