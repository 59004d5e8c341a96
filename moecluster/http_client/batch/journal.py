"""What of a batch is done: a journal beside the output, so that a crash at any point neither repeats nor loses a line.

OUT.partial begins with a line that says which input it belongs to. Then every finished line follows as it ends, on the
disk before it counts. A crash can tear its last line: that is cut off, and its request is sent again. When all are
done, OUT is written aside in the order of the input, renamed, and the journal removed.
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
    """The open journal of one output file, held by one process at a time. Thread-safe."""

    def __init__(
        self, out: Path, batch: BatchInput, *, on_found: Callable[[Output], None] = lambda output: None
    ) -> None:
        """Begins one, or goes on with the one that is there; on_found gets each line that is done already.

        Raises DataError for a journal of another input or one that is damaged, ResourceError if another process holds
        it or the disk refuses.
        """
        self.path = journal_path(out)
        self.cut_bytes = 0  # of a line that a crash had torn
        self.done = 0
        self._out = out
        self._batch = batch
        self._lock = threading.Lock()
        self._offsets = array("q", [NOT_DONE]) * len(batch)
        self._failure = ""
        try:
            self._file = _open_alone(self.path)  # read by it, written by its descriptor
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
        """The indexes of the input's lines that are not done."""
        return (index for index, offset in enumerate(self._offsets) if offset == NOT_DONE)

    def append(self, outputs: Sequence[tuple[int, Output]]) -> None:
        """Notes finished lines, by their index; they are on the disk on return. Raises ResourceError."""
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
        """Puts the output in its place, complete and in the order of the input. Raises ResourceError."""
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
        """Lets another process go on with it."""
        with self._lock:
            self._file.close()

    def _resume(self, on_found: Callable[[Output], None]) -> int:
        """Takes in what is there. Returns the length of what counts."""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        header = {"journal": FORM, "input_sha256": self._batch.sha256, "lines": len(self._batch)}
        first = self._file.readline(MAX_HEADER_BYTES)
        # New, or torn before anything was done: a file system may have kept its length and lost what was in it.
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
            # Whatever reached the disk is cut off when the journal is opened again.
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
    """Where the journal of an output lies."""
    return out.with_name(out.name + ".partial")


def is_complete(out: Path, batch: BatchInput) -> bool:
    """Whether an output file holds every line of the input, in its order."""
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
    """The file, locked. Raises ResourceError if another process has it."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            file.close()
            raise ResourceError(f"{path}: another moecluster batch works on it") from exc
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()  # its owner ended, and removed it, between our two calls


def _sync_folder(path: Path) -> None:
    """So that a name in it outlives a loss of power."""
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _encoded(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _decoded(content: bytes) -> Any:
    """JSON, or None."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
