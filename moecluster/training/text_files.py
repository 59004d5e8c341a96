"""Text files as documents, and what of them is left out, with the reason."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moecluster.errors import DataError

SHOWN = 3  # names of each kind
NOT_UTF8, BINARY, UNREADABLE = "not UTF-8", "binary (with zero bytes, as UTF-16 has)", "unreadable"
EMPTY, HIDDEN, NO_FILE = "empty", "hidden", "no regular files, or links to folders or to nothing"


@dataclass(frozen=True, kw_only=True)
class Document:
    """One file, or another piece of text that belongs together."""

    name: str
    text: str


@dataclass(kw_only=True)
class LeftOut:
    """Names of what is not read, by reason; bytes only of what may well have been meant as text."""

    names: dict[str, list[str]] = field(default_factory=dict)
    num_bytes: int = 0
    total_bytes: int = 0  # of all files that are not hidden

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, []).append(name)

    @property
    def share(self) -> float:
        """Of all bytes."""
        return self.num_bytes / self.total_bytes if self.total_bytes else 0.0

    def __str__(self) -> str:
        kinds = []
        for reason, names in self.names.items():
            more = ", ..." if len(names) > SHOWN else ""
            kinds.append(f"{len(names)} {reason} ({', '.join(names[:SHOWN])}{more})")
        return f"{self.share:.1%} of the bytes: {'; '.join(kinds)}"


def read_file(file: Path, name: str) -> Document | str:
    """The document, or the reason why it is none."""
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
    """All files below a directory that are UTF-8 text, whatever their suffix, in order of their names.

    Raises DataError for a folder that cannot be listed.
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
    """Regular files, and links to some, that are not hidden; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        for name in sorted((*folders, *files)):
            entry = Path(folder, name)
            if name.startswith("."):
                left_out.add(HIDDEN, entry.relative_to(root).as_posix())
            elif name in folders and not entry.is_symlink():
                continue  # walked by itself
            elif os.path.isfile(entry):
                yield entry
            else:
                left_out.add(NO_FILE, entry.relative_to(root).as_posix())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
