"""Which directories may be read at an order's word: those that the cluster was given, and what lies below them.

The cluster's secret lets its holder order; it does not let him choose files of the service's owner. So an order that
names a directory is carried out only where whoever runs the cluster has given that one by another way.
"""

import os
from collections.abc import Callable, Iterable

from moecluster.errors import NotGiven

IsGiven = Callable[[str], bool]  # whether the cluster was given this directory; raises Unavailable if nobody says

MAX_SHOWN = 200  # characters of a refused path


def check_given(path: str, is_given: IsGiven) -> None:
    """Raises NotGiven, in one line, for a directory that the cluster was not given; Unavailable if nobody says."""
    if not is_given(path):
        shown = path if path.isprintable() else ascii(path)
        shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
        raise NotGiven(
            f"{shown or 'an empty path'}: the cluster was not given this directory; "
            "moecluster up, update and train give it theirs"
        )


def is_within(path: str, directories: Iterable[str]) -> bool:
    """Whether an absolute path is one of these directories or lies below one, with "..", and symbolic links on this
    host, resolved. Links inside a directory, as the hub's cache has them to its files, are that directory's own."""
    real = _resolved(path)
    if real is None:
        return False
    return any(base is not None and os.path.commonpath((base, real)) == base for base in map(_resolved, directories))


def _resolved(path: str) -> str | None:
    """None for what is no absolute path."""
    if not os.path.isabs(path):
        return None
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # a zero byte, half a surrogate pair
        return None
