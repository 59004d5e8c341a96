"""Checks and chooses the places where commands write, before any work is spent on output that could not be kept."""

import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from moecluster.errors import ConfigError, ResourceError

MAX_SOCKET_PATH_BYTES = 107  # the kernel's limit for the path of a Unix socket
# What follows it: Ray's folder, in which Ray creates session_DATE_TIME_PID/sockets/plasma_store
BEHIND_SOCKET_FOLDER_BYTES = len("/ray/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store")
SOCKET_FOLDER_PREFIX = "moecluster-"
RANDOM_BYTES = 4  # after the prefix, as hexadecimal digits


def make_socket_folder() -> str:
    """Creates a folder that only this user may enter (mode 0700), with a path short enough for Ray's sockets in it.

    Ray opens its own folder to all users, so that one must be inside this.
    Raises ResourceError if no folder can be created.
    """
    folder = name_socket_folder()
    try:
        os.mkdir(folder, mode=0o700)
    except OSError as exc:
        raise ResourceError(f"{folder} cannot be made for Ray's sockets: {exc.strerror}") from exc
    return folder


def name_socket_folder() -> str:
    """Returns a path for such a folder, which does not exist yet.

    In TMPDIR if its path is short enough (in many batch systems it is not), else in one of the usual places.
    Raises ResourceError if no place is suitable.
    """
    refused = []
    for parent in _socket_parents():
        if len(os.fsencode(parent)) > longest_socket_parent_bytes():
            refused.append(f"{parent} is too long")
            continue
        try:
            with tempfile.TemporaryFile(dir=parent):
                pass
            return f"{parent.rstrip('/')}/{SOCKET_FOLDER_PREFIX}{secrets.token_hex(RANDOM_BYTES)}"
        except OSError as exc:
            refused.append(f"{parent}: {exc.strerror}")
    raise ResourceError(
        f"there is no place for Ray's sockets ({'; '.join(refused)}): set TMPDIR to a folder that you can write, "
        f"whose path has at most {longest_socket_parent_bytes()} bytes (a socket's may have {MAX_SOCKET_PATH_BYTES})"
    )


def longest_socket_parent_bytes() -> int:
    """Returns the longest path, in bytes, of a folder in which make_socket_folder can create one."""
    name_bytes = len(f"/{SOCKET_FOLDER_PREFIX}") + 2 * RANDOM_BYTES
    return MAX_SOCKET_PATH_BYTES - BEHIND_SOCKET_FOLDER_BYTES - name_bytes


def probe_folder(path: Path) -> None:
    """Raises OSError if no file can be written below a folder, which need not exist yet. Leaves nothing behind."""
    try:
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise
        probe_folder(path.parent)
        return
    with tempfile.TemporaryFile(dir=path):
        pass


def check_folder(name: str, path: str) -> None:
    """Raises ConfigError if no file can be written below a folder. name: the setting, for the error message."""
    try:
        probe_folder(Path(path).absolute())
    except OSError as exc:
        raise ConfigError(
            f'{name}: "{path}" cannot be written ({exc.strerror}); give a folder that you can write'
        ) from exc


def check_file(name: str, path: Path) -> None:
    """Raises ConfigError if a file cannot be written: its folder does not exist, or the system refuses.

    Leaves no new file, and does not change an existing one. name: the option, for the error message.
    """
    if os.path.isdir(path) or not os.path.isdir(path.absolute().parent):
        raise ConfigError(f'{name}: got "{path}", expected a file in a folder that is there')
    try:
        if os.path.lexists(path):
            if not stat.S_ISFIFO(path.stat().st_mode):  # opening a pipe waits for its reader
                os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
            path.unlink()
    except OSError as exc:
        raise ConfigError(
            f'{name}: "{path}" cannot be written ({exc.strerror}); give a file in a folder that you can write'
        ) from exc


def _socket_parents() -> list[str]:
    """Returns candidate folders in order. Those in memory, or removed when the user logs out, come last."""
    found = []
    with suppress(FileNotFoundError):  # no folder for temporary files at all
        found.append(tempfile.gettempdir())
    found += ["/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm"]
    return [parent for parent in dict.fromkeys(found) if os.path.isabs(parent)]
