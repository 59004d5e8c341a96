"""Opens a file that a peer process on this host holds open: exactly the file that was checked, and only our user's."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ForeignDescriptor(OSError):
    """The peer's descriptor is of another kind than expected, or of another user."""


@contextmanager
def opened_at_peer(pid: int, fd: int, what: str, check: Callable[[os.stat_result, str], bool]) -> Iterator[str]:
    """Context: a path to the file behind a process's descriptor, for the caller to open.

    what: the expected kind of file, for the error. check: whether it is one, from its status and its name in /proc. The
    process may reuse the descriptor's number at any time, so the file is first held, without opening it, and only the
    held file is checked and opened. Raises OSError; ForeignDescriptor if it is refused.
    """
    process = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # never a later process of this pid
    try:
        if os.fstat(process).st_uid != os.geteuid():
            raise ForeignDescriptor(f"process {pid} is another user's")
        held = os.open(f"fd/{fd}", os.O_PATH | os.O_CLOEXEC, dir_fd=process)
    finally:
        os.close(process)
    try:
        path = f"/proc/self/fd/{held}"
        found = os.fstat(held)
        if found.st_uid != os.geteuid():
            raise ForeignDescriptor(f"descriptor {fd} of process {pid} is of another user's file")
        if not check(found, os.readlink(path)):
            raise ForeignDescriptor(f"descriptor {fd} of process {pid} is no {what}")
        yield path
    finally:
        os.close(held)


def is_pipe(found: os.stat_result, name: str) -> bool:
    """Whether it is an anonymous pipe: a FIFO in a folder has a path."""
    return stat.S_ISFIFO(found.st_mode) and name.startswith("pipe:[")


def is_memory(found: os.stat_result, name: str, wanted: str) -> bool:
    """Whether it is a memfd of this name."""
    return stat.S_ISREG(found.st_mode) and name == f"/memfd:{wanted} (deleted)"
