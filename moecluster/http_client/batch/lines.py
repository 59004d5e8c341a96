"""The lines of a batch file: checked before anything is sent, read one at a time afterwards."""

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
SHOWN_MISTAKES = 10


@dataclass(frozen=True, kw_only=True)
class BatchLine:
    """One request."""

    number: int  # of the line in its file, from 1
    custom_id: str
    url: str
    body: dict[str, Any]
    problem: str = ""  # why it cannot be sent; empty: it can


class BatchInput:
    """A batch file. Memory grows by a few bytes a line."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the whole file; blank lines count for nothing.

        Raises DataError for malformed lines and for a custom_id that stands twice, by their numbers.
        """
        self.path = path
        self._offsets = array("Q")
        self._numbers = array("Q")
        digest, seen, mistakes = hashlib.sha256(), dict[bytes, int](), []
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
                    # 16 bytes an id, however long it is
                    name = hashlib.blake2b(line.custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
                    if name in seen:
                        raise DataError(f"the custom_id {shown(line.custom_id)} stands in line {seen[name]} already")
                    seen[name] = number
                    self._offsets.append(offset)
                    self._numbers.append(number)
                except DataError as exc:
                    mistakes.append(f"line {number}: {exc}")
            offset += len(content)
        if mistakes:
            more = f"; and {len(mistakes) - SHOWN_MISTAKES} more" if len(mistakes) > SHOWN_MISTAKES else ""
            raise DataError(f"{path}: nothing was sent; {'; '.join(mistakes[:SHOWN_MISTAKES])}{more}")
        if not self._offsets:
            raise DataError(f"{path}: holds no line, expected one JSON object a line")
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def line(self, index: int) -> BatchLine:
        """The index-th request, from 0. Raises DataError if the file has been changed since it was checked."""
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
    """Lines with their ends. Of one that is too long comes the beginning, which is too long itself."""
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
    """The value, and why it cannot be sent as it stands. Raises DataError for what is no JSON at all."""
    try:
        return parse_json(content), ""
    except TooDeep as exc:
        raise DataError(str(exc)) from exc
    except JsonProblem as problem:
        try:
            return json.loads(content), str(problem)
        except ValueError:
            raise DataError(str(problem)) from problem
