"""Opening what a peer on this host holds open: the very file that was looked at, and of a process of our own user."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ForeignDescriptor(OSError):
    """What the peer names is not what it should be, or not of this user."""


@contextmanager
def opened_at_peer(pid: int, fd: int, what: str, check: Callable[[os.stat_result, str], bool]) -> Iterator[str]:
    """A path of ours to the file behind a descriptor of a process, while the block runs: to be opened as it is wanted.

    what: the kind of file that is wanted. check: whether it is one, by its status and its name in /proc. The process
    may have another file under that number a moment later: so the file is held first, without opening it, and only
    what is held is looked at and opened. Raises OSError; ForeignDescriptor if it is refused.
    """
    process = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # of this process, and no later one
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
    """A pipe without a name: a FIFO in a folder has a path."""
    return stat.S_ISFIFO(found.st_mode) and name.startswith("pipe:[")


def is_memory(found: os.stat_result, name: str, wanted: str) -> bool:
    """A memfd of this name."""
    return stat.S_ISREG(found.st_mode) and name == f"/memfd:{wanted} (deleted)"
