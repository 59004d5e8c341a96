"""Checks the folders that a cluster writes: whether it may, and how much room there is."""

import os
from collections.abc import Callable
from pathlib import Path

from actors.places import name_socket_folder, probe_folder
from moecluster.cli.commands.doctor.finding import Check, Finding, Level, ok, problem, warning
from moecluster.cli.common.formatting import shown_bytes
from moecluster.config import Config
from moecluster.errors import ResourceError
from moecluster.rpc.credentials import state_folder

RAY_LIMIT = 0.95  # part of a file system in use: above it, Ray refuses to spill objects
LOGS_BYTES = 2**30
CHECKPOINT_BYTES = 2**30  # a checkpoint of a small model, with its optimizer's state
STATE_BYTES = 2**20


def state(config: Config) -> Finding:
    """The folder in which clusters that are up are recorded, with their secrets."""
    try:
        folder = state_folder()
    except ResourceError as exc:
        return problem(str(exc), "set XDG_STATE_HOME to a folder of yours")
    return _folder(folder, STATE_BYTES, "set XDG_STATE_HOME to a folder that you can write")


def sockets(config: Config) -> Finding:
    """The folder of Ray's sockets and logs."""
    try:
        folder = Path(name_socket_folder()).parent
    except ResourceError as exc:
        return problem(str(exc), "set TMPDIR")
    found = _folder(folder, LOGS_BYTES, "set TMPDIR to a folder that you can write")
    status = os.statvfs(folder)
    used = 1 - status.f_bavail / max(status.f_blocks, 1)
    if found.level is not Level.PROBLEM and used > RAY_LIMIT:
        return warning(
            f"the file system of {folder} is {used:.0%} full: Ray stores no object there above {RAY_LIMIT:.0%}",
            "free space, or set TMPDIR to another file system",
        )
    return found


def output(config: Config) -> Finding:
    """The folder of a training run's checkpoints and plots."""
    folder = Path(config.train.output_dir).absolute()
    return _folder(folder, CHECKPOINT_BYTES, "set train.output_dir to a folder that you can write", kind=warning)


def _folder(folder: Path, wanted_bytes: int, advice: str, kind: Callable[[str, str], Finding] = problem) -> Finding:
    """kind: of the finding if nothing can be written there."""
    try:
        probe_folder(folder)
        status = os.statvfs(_existing(folder))
    except OSError as exc:
        return kind(f"{folder}: {exc.strerror or exc}", advice)
    if status.f_files and not status.f_favail:
        return kind(f"{folder}: its file system has no inode left", "remove files, or use another file system")
    free = status.f_bavail * status.f_frsize
    if free < wanted_bytes:
        return warning(f"{folder}: only {shown_bytes(free)} are free", f"free at least {shown_bytes(wanted_bytes)}")
    return ok(f"{folder}: {shown_bytes(free)} are free")


def _existing(folder: Path) -> Path:
    """Returns the folder, or the closest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


CHECKS = (
    Check(name="state", run=state),
    Check(name="sockets and logs", run=sockets),
    Check(name="training output", run=output),
)
