"""Shortages of a process or machine, which pass: what fails because of them may succeed a moment later."""

import errno

CODES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})  # descriptors, and kernel memory


def is_shortage(error: BaseException | None) -> bool:
    """Returns whether an operating system's error tells of one."""
    return isinstance(error, OSError) and error.errno in CODES
