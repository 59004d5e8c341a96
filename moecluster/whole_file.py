"""Files that appear under their names only once they are complete: written aside, synced, renamed."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing_whole(path: Path, *, mode: int | None = None) -> Iterator[Path]:
    """Context: an empty file to write to, of the same ending, which then takes the place of `path`. If anything fails,
    what was there before stays as it was.

    mode: of the file; a link in its place is replaced. None: as of the file that it replaces, else as usual; links are
    followed, and what is no file, such as a pipe, is written to itself. Raises OSError, which names the path.
    """
    if mode is None:
        path = path.resolve()
        if path.exists() and not path.is_file():
            yield path
            return
    aside = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        _create(aside, 0o666 if mode is None else mode)
        if mode is None and path.exists():
            aside.chmod(stat.S_IMODE(path.stat().st_mode))
        try:
            yield aside
            _sync(aside)
            aside.rename(path)
            _sync(path.parent)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as exc:
        if exc.filename in (None, str(aside)):
            raise OSError(exc.errno, exc.strerror, str(path)) from exc
        raise


def write_whole(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Writes a file in one step, as writing_whole does."""
    with writing_whole(path, mode=mode) as aside:
        aside.write_bytes(content)


def _create(path: Path, mode: int) -> None:
    path.unlink(missing_ok=True)  # left by a process that was killed
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
