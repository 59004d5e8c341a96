"""Reads files that users bring: any error that a library raises on one becomes a one-line error that names the file.

Imports nothing of transformers.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moecluster.errors import CheckpointError, MoeClusterError, UserError

MAX_REASON_CHARACTERS = 200

LFS_POINTER = b"version https://git-lfs"
_PANIC = "PanicException"  # raised by Rust libraries; not a subclass of Exception, and cannot be imported


@contextmanager
def reading(path: str | Path, right: str, *, error: type[UserError] = CheckpointError) -> Iterator[None]:
    """Turns any exception of the block, which reads a file or directory, into `error`. right: advice for the user.

    moecluster's own errors, interrupts and out-of-memory errors pass through.
    """
    try:
        yield
    except (MoeClusterError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as exc:
        if not isinstance(exc, Exception) and type(exc).__name__ != _PANIC:
            raise
        raise error(f"{path} cannot be used: {one_line(exc)}; {right}") from exc


def read_object(path: Path, right: str) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises CheckpointError."""
    problem = file_problem(path)
    if problem is not None:
        raise CheckpointError(f"{path} cannot be used: {problem}; {right}")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def file_problem(path: Path) -> str | None:
    """Returns what makes a file unreadable, or None if nothing is found. A .json file must hold a JSON object."""
    try:
        if path.exists() and not path.is_file():
            return "it is a directory" if path.is_dir() else "it is no regular file"
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
        if not head:
            return "it is empty"
        if head == LFS_POINTER:
            return "it is a git-lfs pointer, not the file that it stands for: run git lfs pull"
        if path.suffix == ".json" and not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            return "it is no JSON object"
    except OSError as error:
        return error.strerror or one_line(error)
    except (ValueError, RecursionError) as error:
        return f"it is no JSON ({one_line(error)})"
    return None


def one_line(error: BaseException) -> str:
    """Returns the error's text, shortened to one line."""
    text = " ".join(str(error).split())[:MAX_REASON_CHARACTERS] or type(error).__name__
    return f"unknown {text}" if isinstance(error, KeyError) else text
