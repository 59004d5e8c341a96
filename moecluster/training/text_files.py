"""Reads text files as documents, and records which files are skipped and why."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moecluster.errors import DataError

SHOWN = 3  # file names listed per reason
NOT_UTF8, BINARY, UNREADABLE = "not UTF-8", "binary (with zero bytes, as UTF-16 has)", "unreadable"
EMPTY, HIDDEN, NO_FILE = "empty", "hidden", "no regular files, or links to folders or to nothing"


@dataclass(frozen=True, kw_only=True)
class Document:
    """One file, or another self-contained text."""

    name: str
    text: str


@dataclass(kw_only=True)
class LeftOut:
    """The names of skipped files, by reason. num_bytes leaves out empty and hidden files, and those that are no regular
    files."""

    names: dict[str, list[str]] = field(default_factory=dict)
    num_bytes: int = 0
    total_bytes: int = 0  # of all files that are not hidden

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, []).append(name)

    @property
    def share(self) -> float:
        """The skipped fraction of all bytes."""
        return self.num_bytes / self.total_bytes if self.total_bytes else 0.0

    def __str__(self) -> str:
        kinds = []
        for reason, names in self.names.items():
            more = ", ..." if len(names) > SHOWN else ""
            kinds.append(f"{len(names)} {reason} ({', '.join(names[:SHOWN])}{more})")
        return f"{self.share:.1%} of the bytes: {'; '.join(kinds)}"


def read_file(file: Path, name: str) -> Document | str:
    """Returns the document, or the reason why the file is skipped."""
    try:
        content = file.read_bytes()
    except OSError:
        return UNREADABLE
    if b"\0" in content:
        return BINARY
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return NOT_UTF8
    return Document(name=name, text=text) if text.strip() else EMPTY


def read_directory(root: Path) -> tuple[list[Document], LeftOut]:
    """Reads all UTF-8 text files below a directory, whatever their suffix, ordered by name.

    Raises DataError if a folder cannot be listed.
    """
    documents: list[Document] = []
    left_out = LeftOut()
    for file in _entries(root, left_out):
        name = file.relative_to(root).as_posix()
        found = read_file(file, name)
        num_bytes = file.stat().st_size
        left_out.total_bytes += num_bytes
        if isinstance(found, Document):
            documents.append(found)
            continue
        left_out.add(found, name)
        if found != EMPTY:
            left_out.num_bytes += num_bytes
    return documents, left_out


def _entries(root: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yields regular files and links to them, except hidden ones. Does not follow links to folders."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        for name in sorted((*folders, *files)):
            entry = Path(folder, name)
            if name.startswith("."):
                left_out.add(HIDDEN, entry.relative_to(root).as_posix())
            elif name in folders and not entry.is_symlink():
                continue  # os.walk descends into it
            elif os.path.isfile(entry):
                yield entry
            else:
                left_out.add(NO_FILE, entry.relative_to(root).as_posix())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
