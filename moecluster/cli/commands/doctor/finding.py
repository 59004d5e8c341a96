"""What a check found, and what to do about it."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from moecluster.config import Config


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"  # a cluster starts, but something is slower, smaller or easier to break
    PROBLEM = "problem"  # keeps a cluster from starting


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check."""

    level: Level
    found: str
    advice: str = ""  # what to do; empty if it is ok


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of this host for the cluster of a configuration."""

    name: str
    run: Callable[[Config], Finding]


def ok(found: str) -> Finding:
    """Nothing to do."""
    return Finding(level=Level.OK, found=found)


def warning(found: str, advice: str) -> Finding:
    """A cluster starts anyway."""
    return Finding(level=Level.WARNING, found=found, advice=advice)


def problem(found: str, advice: str) -> Finding:
    """No cluster starts."""
    return Finding(level=Level.PROBLEM, found=found, advice=advice)
