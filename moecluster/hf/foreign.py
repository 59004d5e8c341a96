"""Files that others wrote: whatever a library raises on one of them becomes one line that names it.

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
_PANIC = "PanicException"  # of a library in Rust; no Exception, and importable from nowhere


@contextmanager
def reading(path: str | Path, right: str, *, error: type[UserError] = CheckpointError) -> Iterator[None]:
    """Raises `error` for whatever the block raises on a file or directory. right: what would be right.

    Our own errors, interrupts and a lack of memory pass.
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
    """The JSON object in a file. Raises CheckpointError."""
    problem = file_problem(path)
    if problem is not None:
        raise CheckpointError(f"{path} cannot be used: {problem}; {right}")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def file_problem(path: Path) -> str | None:
    """What is wrong with a file for anything that reads it; a .json has to be a JSON object. None: nothing shows."""
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
    """The error's text, shortened, in one line."""
    text = " ".join(str(error).split())[:MAX_REASON_CHARACTERS] or type(error).__name__
    return f"unknown {text}" if isinstance(error, KeyError) else text
