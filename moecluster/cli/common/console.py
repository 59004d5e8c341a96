"""Console output: to a terminal, or to a pipe or file without line wrapping."""

import sys

from rich.console import Console

UNLIMITED = 10**9  # characters in a line
HEIGHT = 25  # where there is no terminal


def make_console(*, stderr: bool = False) -> Console:
    """Returns a console for stdout or stderr. Without a terminal, nothing is wrapped or cut, whatever COLUMNS says."""
    if (sys.stderr if stderr else sys.stdout).isatty():
        return Console(stderr=stderr)
    return Console(stderr=stderr, width=UNLIMITED, height=HEIGHT)
