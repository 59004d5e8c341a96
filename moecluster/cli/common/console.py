"""Where commands print: a terminal, or a pipe or file, where no line is too long."""

import sys

from rich.console import Console

UNLIMITED = 10**9  # characters in a line
HEIGHT = 25  # of what has none


def make_console(*, stderr: bool = False) -> Console:
    """Standard output or error. Where that is no terminal, nothing is wrapped or cut, whatever COLUMNS says."""
    if (sys.stderr if stderr else sys.stdout).isatty():
        return Console(stderr=stderr)
    return Console(stderr=stderr, width=UNLIMITED, height=HEIGHT)
