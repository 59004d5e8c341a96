"""The local Rays that the tests have started: their processes inherit a mark."""

import psutil

from actors.local_ray import MARK
from tests.conftest import processes_of_this_session


def local_rays() -> set[str]:
    """Returns the marks of the local Rays that still have a process."""
    return {mark for process in processes_of_this_session() if (mark := _mark_of(process))}


def processes_of(mark: str) -> list[psutil.Process]:
    """Returns the processes of one local Ray."""
    return [process for process in processes_of_this_session() if _mark_of(process) == mark]


def parts(of: str) -> list[psutil.Process]:
    """Returns the processes of local Rays whose command lines contain a word."""
    return [process for process, line in processes_of_this_session().items() if of in line and _mark_of(process)]


def _mark_of(process: psutil.Process) -> str:
    try:
        return process.environ().get(MARK, "")
    except psutil.NoSuchProcess:
        return ""  # it has ended since it was listed
