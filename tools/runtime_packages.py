"""The installed packages that a package needs, and those that they need in turn: what users have."""

from collections.abc import Collection
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "moecluster"
EXTRAS = ("plots", "serve")  # what a user may install


def runtime_packages(root: str = PACKAGE, extras: Collection[str] = EXTRAS) -> dict[str, str]:
    """Returns canonical name -> who asks for it first, of every installed package that the root needs, without itself.

    Raises LookupError, naming it, for a package that is needed and not installed.
    """
    found: dict[str, str] = {}
    followed: set[tuple[str, str]] = set()
    waiting = [(root, extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in followed:
            continue
        followed.add((name, extra))
        for wanted in _requirements(name, extra):
            needed = canonicalize_name(wanted.name)
            found.setdefault(needed, name)
            waiting += [(needed, other) for other in ("", *sorted(wanted.extras))]
    found.pop(canonicalize_name(root), None)
    return found


def _requirements(name: str, extra: str) -> list[Requirement]:
    """The requirements of a package in this environment, with those of one of its extras."""
    try:
        texts = metadata.requires(name) or ()
    except metadata.PackageNotFoundError as exc:
        raise LookupError(f"{name} is needed and not installed") from exc
    wanted = (Requirement(text) for text in texts)
    return [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": extra})]
