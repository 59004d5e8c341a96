"""Packs the working directory of a job: bounded in size, without ignored files and the usual places of secrets."""

import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec
from rich.filesize import decimal

from moecluster.errors import ConfigError

MAX_BYTES = 64 * 2**20  # of all files, uncompressed. Ray keeps the package in its head's memory, and takes 100 MiB
MAX_FILES = 20_000
IGNORE_FILES = (".gitignore", ".rayignore")
# Never of use to a job, or secret. Patterns as in .gitignore.
EXCLUDES = (
    ".git", ".hg", ".svn", ".venv", "venv", "node_modules", "__pycache__", "*.pyc", ".mypy_cache", ".ruff_cache",
    ".pytest_cache", ".env", ".env.*", ".ssh", ".aws", ".netrc", "*.pem", "*.key", "*.secret", "auth_token", "id_rsa*",
    "id_ed25519*", "id_ecdsa*",
)  # fmt: skip
EPOCH = (1980, 1, 1, 0, 0, 0)  # in every package: equal files make an equal package, which Ray keeps only once


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A package that was written."""

    path: Path  # a .zip
    files: int
    total_bytes: int  # uncompressed


def pack(directory: Path, package: Path, *, exclude: Sequence[str] = ()) -> Packed:
    """Writes the files of a directory into a .zip.

    exclude: patterns as in .gitignore, besides EXCLUDES and the .gitignore and .rayignore files of every folder.
    Raises ConfigError, before anything is written, for a directory that is too large, for a link that leads out of it
    or to a folder, and for whatever is no file.
    """
    if not directory.is_dir():
        raise ConfigError(f'--working-dir: got "{directory}", expected a directory')
    root = directory.resolve()
    found = list(_files(root, [(root, GitIgnoreSpec.from_lines([*EXCLUDES, *exclude]))]))
    total_bytes = sum(size_bytes for _, size_bytes in found)
    if total_bytes > MAX_BYTES or len(found) > MAX_FILES:
        largest = ", ".join(
            f"{path.relative_to(root)} ({decimal(size_bytes)})"
            for path, size_bytes in sorted(found, key=lambda file: -file[1])[:3]
        )
        raise ConfigError(
            f"--working-dir: {directory} has {len(found)} files of {decimal(total_bytes)}, and a job's may have "
            f"{MAX_FILES} of {decimal(MAX_BYTES)}; the largest are {largest}: leave them out (--exclude, .gitignore), "
            "and put models and corpora where the hosts read them"
        )
    with zipfile.ZipFile(package, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for path, _ in found:
            entry = zipfile.ZipInfo(str(path.relative_to(root)), EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (stat.S_IFREG | (0o755 if os.access(path, os.X_OK) else 0o644)) << 16
            archive.writestr(entry, path.read_bytes())
    return Packed(path=package, files=len(found), total_bytes=total_bytes)


def _files(folder: Path, ignored: list[tuple[Path, GitIgnoreSpec]]) -> Iterator[tuple[Path, int]]:
    """Yields files with their sizes, sorted. ignored: patterns with the folder to which they are relative."""
    ignored = [*ignored, *_ignore_files(folder)]
    root = ignored[0][0]
    for path in sorted(folder.iterdir()):
        # A pattern that ends in / matches folders only.
        is_folder = path.is_dir()
        if any(spec.match_file(f"{path.relative_to(top)}{'/' * is_folder}") for top, spec in ignored):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ConfigError(f"--working-dir: {path} leads out of the directory; --exclude it, or put its files there")
        if is_folder and not path.is_symlink():
            yield from _files(path, ignored)
        elif path.is_file():
            yield path, path.stat().st_size
        else:
            raise ConfigError(
                f"--working-dir: {path} is {'a link to a folder' if is_folder else 'no file'}; --exclude it"
            )


def _ignore_files(folder: Path) -> Iterator[tuple[Path, GitIgnoreSpec]]:
    for name in IGNORE_FILES:
        with suppress(FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
            yield folder, GitIgnoreSpec.from_lines((folder / name).read_text(encoding="utf-8").splitlines())
