"""The journal of a batch, next to its output: after a crash at any point no finished line is lost or sent again.

OUT.partial starts with a header that identifies the input. Each finished line is appended and synced to disk before it
counts as done. A crash can tear the last line: it is cut off, and its request is sent again. When all lines are done,
OUT is written to a temporary file in the order of the input and renamed, and the journal is removed.
"""

import fcntl
import json
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from moecluster.errors import DataError, ResourceError
from moecluster.http_client.batch.lines import BatchInput

FORM = 1
NOT_DONE = -1
MAX_HEADER_BYTES = 4096

Output = Mapping[str, Any]  # a line of OUT


class Journal:
    """The open journal of one output file, locked by one process at a time. Thread-safe."""

    def __init__(
        self, out: Path, batch: BatchInput, *, on_found: Callable[[Output], None] = lambda output: None
    ) -> None:
        """Creates the journal, or resumes an existing one; on_found gets each line that is already done.

        Raises DataError for a journal of another input or a damaged one, ResourceError if another process holds it or
        it cannot be read or written.
        """
        self.path = journal_path(out)
        self.cut_bytes = 0  # size of the torn end that was cut off
        self.done = 0
        self._out = out
        self._batch = batch
        self._lock = threading.Lock()
        self._offsets = array("q", [NOT_DONE]) * len(batch)
        self._failure = ""
        try:
            self._file = _open_alone(self.path)  # read through the file object, written through its descriptor
        except OSError as exc:
            raise ResourceError(f"{self.path}: cannot be written ({exc.strerror})") from exc
        try:
            self._end = self._resume(on_found)
        except OSError as exc:
            self._file.close()
            raise ResourceError(f"{self.path}: cannot be read or written ({exc.strerror})") from exc
        except BaseException:
            self._file.close()
            raise

    def pending(self) -> Iterator[int]:
        """Yields the indexes of the input's lines that are not done."""
        return (index for index, offset in enumerate(self._offsets) if offset == NOT_DONE)

    def append(self, outputs: Sequence[tuple[int, Output]]) -> None:
        """Records finished lines, by their index; they are synced to disk on return. Raises ResourceError."""
        with self._lock:
            if self._failure:
                raise ResourceError(self._failure)
            offset, places, content = self._end, [], b""
            for index, output in outputs:
                assert self._offsets[index] == NOT_DONE, f"line {index} ends twice"
                places.append((index, offset + len(content)))
                content += _encoded({"index": index, "output": output})
            self._write(content)
            for index, place in places:
                self._offsets[index] = place
            self.done += len(places)

    def finish(self) -> None:
        """Writes the output, complete and in the order of the input, and removes the journal. Raises ResourceError."""
        assert self.done == len(self._batch), f"{self.done} of {len(self._batch)} lines are done"
        aside = self._out.with_name(self._out.name + ".new")
        try:
            with aside.open("wb") as file, self.path.open("rb") as journal:
                for offset in self._offsets:
                    journal.seek(offset)
                    file.write(_encoded(json.loads(journal.readline())["output"]))
                file.flush()
                os.fsync(file.fileno())
            aside.rename(self._out)
            _sync_folder(self._out)
            self.path.unlink(missing_ok=True)
        except OSError as exc:
            aside.unlink(missing_ok=True)
            raise ResourceError(f"{self._out}: cannot be written ({exc.strerror}); {self._kept()}") from exc

    def close(self) -> None:
        """Closes the file and releases the lock."""
        with self._lock:
            self._file.close()

    def _resume(self, on_found: Callable[[Output], None]) -> int:
        """Reads the existing journal or starts a new one. Returns the length of its valid part."""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        header = {"journal": FORM, "input_sha256": self._batch.sha256, "lines": len(self._batch)}
        first = self._file.readline(MAX_HEADER_BYTES)
        # New, or torn before anything was done: a file system may keep the length but lose the content.
        if _encoded(header).startswith(first.rstrip(b"\0")) and not first.endswith(b"\n"):
            self.cut_bytes = size
            os.ftruncate(self._file.fileno(), 0)
            self._end = 0
            self._write(_encoded(header))
            _sync_folder(self.path)
            return self._end
        if _decoded(first) != header:
            raise DataError(
                f"{self.path}: belongs to another input than {self._batch.path}, or to this one before it was changed; "
                "give another output, or remove it to begin anew"
            )
        end = len(first)
        for number, content in enumerate(iter(self._file.readline, b""), start=2):
            if not content.endswith(b"\n"):
                break
            self._take(content, number, end, on_found)
            end += len(content)
        self.cut_bytes = size - end
        if self.cut_bytes:
            os.ftruncate(self._file.fileno(), end)
            os.fsync(self._file.fileno())
        return end

    def _take(self, content: bytes, number: int, offset: int, on_found: Callable[[Output], None]) -> None:
        record = _decoded(content)
        index, output = (record.get("index"), record.get("output")) if isinstance(record, dict) else (None, None)
        if (
            type(index) is not int
            or not isinstance(output, dict)
            or not 0 <= index < len(self._batch)
            or self._offsets[index] != NOT_DONE
            or output.get("custom_id") != self._batch.line(index).custom_id
        ):
            raise DataError(f"{self.path}: line {number} is damaged; remove the file to begin anew")
        self._offsets[index] = offset
        self.done += 1
        on_found(output)

    def _write(self, content: bytes) -> None:
        file, written = self._file.fileno(), 0
        try:
            while written < len(content):
                written += os.pwrite(file, memoryview(content)[written:], self._end + written)
            os.fsync(file)
        except OSError as exc:
            # Any bytes that reached the disk are cut off when the journal is opened again.
            self._failure = f"{self.path}: cannot be written ({exc.strerror}); {self._kept()}"
            raise ResourceError(self._failure) from exc
        self._end += len(content)

    def _kept(self) -> str:
        return f"{self.done} of {len(self._batch)} lines are kept, and the same command goes on behind them"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def journal_path(out: Path) -> Path:
    """Returns the path of an output's journal."""
    return out.with_name(out.name + ".partial")


def is_complete(out: Path, batch: BatchInput) -> bool:
    """Returns whether an output file holds every line of the input, in its order."""
    try:
        with out.open("rb") as file:
            for index in range(len(batch)):
                fields = _decoded(file.readline())
                if not isinstance(fields, dict) or fields.get("custom_id") != batch.line(index).custom_id:
                    return False
            return not file.readline()
    except OSError:
        return False


def _open_alone(path: Path) -> BinaryIO:
    """Opens and locks the file. Raises ResourceError if another process holds the lock."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            file.close()
            raise ResourceError(f"{path}: another moecluster batch works on it") from exc
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()  # its owner finished and removed the file between our open and our lock


def _sync_folder(path: Path) -> None:
    """Syncs the directory of a path, so that its entry survives a power loss."""
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _encoded(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _decoded(content: bytes) -> Any:
    """Returns the JSON value, or None for invalid JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
