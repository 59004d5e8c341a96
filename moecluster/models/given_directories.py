"""Which directories a request may make the cluster read: those that were given to the cluster, and all below them.

A client with the cluster's secret may send requests, but must not choose among the files of the cluster's owner. So a
request that names a directory is accepted only if the operator has given that directory to the cluster separately.
"""

import os
from collections.abc import Callable, Iterable

from moecluster.errors import NotGiven

IsGiven = Callable[[str], bool]  # whether the cluster was given this directory; raises Unavailable if that is unknown

MAX_SHOWN = 200  # characters of a refused path


def check_given(path: str, is_given: IsGiven) -> None:
    """Raises NotGiven, in one line, if the cluster was not given this directory; Unavailable if that is unknown."""
    if not is_given(path):
        shown = path if path.isprintable() else ascii(path)
        shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
        raise NotGiven(
            f"{shown or 'an empty path'}: the cluster was not given this directory; "
            "moecluster up, update and train give it theirs, and cluster.directories names others"
        )


def is_within(path: str, directories: Iterable[str]) -> bool:
    """Whether an absolute path is one of these directories or lies below one, after resolving ".." and symbolic links
    on this host. Only the directory's own path is resolved: links to files inside it, as in the hub's cache, are
    allowed."""
    real = _resolved(path)
    if real is None:
        return False
    return any(base is not None and os.path.commonpath((base, real)) == base for base in map(_resolved, directories))


def _resolved(path: str) -> str | None:
    """Returns the resolved path, or None if it is not an absolute path."""
    if not os.path.isabs(path):
        return None
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # a zero byte, or a lone surrogate
        return None
