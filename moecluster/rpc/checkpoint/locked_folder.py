"""A temporary folder that its process locks, so that other processes can tell when a killed process left it behind."""

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from moecluster.errors import ResourceError

PREFIX = "moecluster-files-"
LOCK_NAME = ".held"
NEW_S = 60.0  # a younger folder may not be locked yet


class HeldFolder:
    """Removed by `remove` or with its last reference; after a kill, by the next HeldFolder on this host."""

    def __init__(self) -> None:
        """Raises ResourceError if it cannot be made."""
        try:
            _remove_left(Path(tempfile.gettempdir()))
            self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
            self.path = Path(self._folder.name)
            self._lock = (self.path / LOCK_NAME).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ResourceError(
                f"{exc.filename or tempfile.gettempdir()}: a folder for the files of a checkpoint cannot be made "
                f"({exc.strerror}); free some space there, or set TMPDIR to another folder"
            ) from exc

    def write(self, name: str, content: bytes | bytearray) -> None:
        """Writes a file. Raises ResourceError."""
        path = self.path / name
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        except OSError as exc:
            raise ResourceError(
                f"{path}: {len(content)} bytes of a checkpoint's files cannot be written ({exc.strerror}); free some "
                "space there, or set TMPDIR to another folder"
            ) from exc

    def remove(self) -> None:
        """Removes the folder. Idempotent."""
        self._lock.close()
        self._folder.cleanup()


def _remove_left(parent: Path) -> None:
    """Removes this user's folders that no process holds any more."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another process was faster
            found = folder.lstat()
            is_ours = folder.is_dir() and not folder.is_symlink() and found.st_uid == os.getuid()
            if is_ours and time.time() - found.st_mtime >= NEW_S and not _is_held(folder / LOCK_NAME):
                shutil.rmtree(folder, ignore_errors=True)


def _is_held(lock: Path) -> bool:
    try:
        handle = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
