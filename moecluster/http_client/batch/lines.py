"""The lines of a batch file: all checked before anything is sent, then read one at a time."""

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from moecluster.errors import DataError
from moecluster.strict_json import JsonProblem, TooDeep, parse_json, shown

URLS = ("/v1/completions", "/v1/chat/completions")
MAX_LINE_BYTES = 32 * 2**20
MAX_ID_CHARACTERS = 512
SHOWN_ERRORS = 10


@dataclass(frozen=True, kw_only=True)
class BatchLine:
    """One request."""

    number: int  # of the line in its file, from 1
    custom_id: str
    url: str
    body: dict[str, Any]
    problem: str = ""  # why the line cannot be sent; empty: it can


class BatchInput:
    """A batch file. Memory grows by a few bytes per line."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the whole file, skipping blank lines.

        Raises DataError for malformed lines and duplicate custom_ids, giving their line numbers.
        """
        self.path = path
        self._offsets = array("Q")
        self._numbers = array("Q")
        digest, seen, errors = hashlib.sha256(), dict[bytes, int](), []
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is no regular file, and a batch is read twice; write it to one")
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as exc:
            raise DataError(f"{path}: cannot be read ({exc.strerror})") from exc
        offset = 0
        for number, content in enumerate(_lines_of(self._file), start=1):
            digest.update(content)
            if content.strip():
                try:
                    line = _parsed(content, number)
                    # a hash of 16 bytes bounds the memory per id
                    name = hashlib.blake2b(line.custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
                    if name in seen:
                        raise DataError(f"the custom_id {shown(line.custom_id)} is in line {seen[name]} already")
                    seen[name] = number
                    self._offsets.append(offset)
                    self._numbers.append(number)
                except DataError as exc:
                    errors.append(f"line {number}: {exc}")
            offset += len(content)
        if errors:
            more = f"; and {len(errors) - SHOWN_ERRORS} more" if len(errors) > SHOWN_ERRORS else ""
            raise DataError(f"{path}: nothing was sent; {'; '.join(errors[:SHOWN_ERRORS])}{more}")
        if not self._offsets:
            raise DataError(f"{path}: holds no line, expected one JSON object a line")
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def line(self, index: int) -> BatchLine:
        """Returns the index-th request, from 0. Raises DataError if its line is no longer valid."""
        self._file.seek(self._offsets[index])
        number = self._numbers[index]
        try:
            return _parsed(self._file.readline(MAX_LINE_BYTES + 1), number)
        except DataError as exc:
            raise DataError(f"{self.path}: changed while it was worked on; line {number}: {exc}") from exc

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Yields lines with their line ends. An overlong line is cut to MAX_LINE_BYTES + 1 bytes: still too long."""
    while content := file.readline(MAX_LINE_BYTES + 1):
        yield content
        while len(content) > MAX_LINE_BYTES and not content.endswith(b"\n"):
            content = file.readline(MAX_LINE_BYTES + 1)


def _parsed(content: bytes, number: int) -> BatchLine:
    if len(content) > MAX_LINE_BYTES:
        raise DataError(f"longer than {MAX_LINE_BYTES} bytes")
    fields, problem = _read(content)
    if not isinstance(fields, dict):
        raise DataError("no JSON object")
    custom_id, url, body = fields.get("custom_id"), fields.get("url"), fields.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARACTERS:
        raise DataError(f'"custom_id": expected a text of 1 to {MAX_ID_CHARACTERS} characters')
    if not custom_id.isascii() and any("\ud800" <= character <= "\udfff" for character in custom_id):
        raise DataError(f'"custom_id": {shown(custom_id)} holds half a surrogate pair, which is no character')
    if fields.get("method") != "POST":
        raise DataError('"method": expected "POST"')
    if url not in URLS:
        raise DataError(f'"url": expected {" or ".join(URLS)}')
    if not isinstance(body, dict):
        raise DataError('"body": expected an object, the request')
    if body.get("stream"):
        raise DataError('"body.stream": a batch is not streamed')
    return BatchLine(number=number, custom_id=custom_id, url=url, body=body, problem=problem)


def _read(content: bytes) -> tuple[Any, str]:
    """Returns the value, and why it cannot be sent unchanged. Raises DataError for invalid JSON."""
    try:
        return parse_json(content), ""
    except TooDeep as exc:
        raise DataError(str(exc)) from exc
    except JsonProblem as problem:
        try:
            return json.loads(content), str(problem)
        except ValueError:
            raise DataError(str(problem)) from problem
