"""Checksums of the safetensors files that moecluster writes, stored in their header.

The header's `__metadata__` has, under one key, a JSON object: `header`, the CRC-32 of the header's tensor entries;
`tensors`, eight hex digits for every unit of every tensor, in the header's order; `by_row`, the tensors that have one
unit per row of their first dimension, since experts are read by row. Every other tensor is one unit. So each reader
checks only what it reads. Files without the key, which others wrote, are not checked. CRC-32 guards only against
accidental damage.
"""

import json
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecluster.errors import CheckpointError

METADATA = "__metadata__"
CHECKSUMS_KEY = "moecluster.crc32"
PIECE_BYTES = 2**20  # read at once, so that the checksum finds the bytes in the CPU cache

_HEX = 8  # digits of a checksum


@dataclass(frozen=True, kw_only=True)
class TensorChecksums:
    """Checksums of one tensor's units, which have equal length."""

    key: str
    unit_bytes: int
    crcs: tuple[int, ...]


class RunningCheck:
    """Checks a tensor's bytes as they are read in order, from the beginning of a unit."""

    def __init__(self, file: Path, sums: TensorChecksums, begin: int) -> None:
        """begin: offset of the first byte within the tensor."""
        self._file, self._sums = file, sums
        self.at = begin
        self._crc = 0

    def add(self, content: memoryview) -> None:
        """Takes the next bytes. Raises CheckpointError at the end of a unit whose checksum is wrong."""
        while content:
            unit, done = divmod(self.at, self._sums.unit_bytes)
            part = content[: self._sums.unit_bytes - done]
            self._crc = zlib.crc32(part, self._crc)
            self.at += len(part)
            content = content[len(part) :]
            if done + len(part) == self._sums.unit_bytes:
                if self._crc != self._sums.crcs[unit]:
                    row = f", row {unit}" if len(self._sums.crcs) > 1 else ""
                    raise CheckpointError(
                        f"{self._file} is damaged: the bytes of {self._sums.key}{row} are not those that were written; "
                        "copy it again"
                    )
                self._crc = 0


def running_check(file: Path, sums: TensorChecksums | None, begin: int) -> RunningCheck | None:
    """Returns None if there are no checksums, or if reading begins in the middle of a unit."""
    if sums is None or not sums.unit_bytes or begin % sums.unit_bytes:
        return None
    return RunningCheck(file, sums, begin)


class SummedHeader:
    """The header of a file that is being written. Its length does not depend on the checksums."""

    def __init__(self, entries: Mapping[str, Mapping[str, Any]], by_row: Collection[str] = ()) -> None:
        """entries: key -> dtype, shape and data_offsets, as in the file format."""
        self._entries = {key: dict(entry) for key, entry in entries.items()}
        self._by_row = [key for key in self._entries if key in by_row]
        self._crcs: dict[str, list[int | None]] = {
            key: [None] * _units(key, entry, self._by_row) for key, entry in self._entries.items()
        }

    def set(self, key: str, crcs: Iterable[int], first: int = 0) -> None:
        """Sets the checksums of the tensor's units, starting with unit (row) `first`."""
        for unit, crc in enumerate(crcs, start=first):
            self._crcs[key][unit] = crc

    def unit_bytes(self, key: str) -> int:
        begin, end = self._entries[key]["data_offsets"]
        return int(end - begin) // max(len(self._crcs[key]), 1)

    def to_bytes(self) -> bytes:
        """Returns header size and header. Units without a checksum count as zeros."""
        zeros: dict[int, int] = {}
        digits = []
        for key, crcs in self._crcs.items():
            size = self.unit_bytes(key)
            if None in crcs and size not in zeros:
                zeros[size] = _crc_of_zeros(size)
            digits += [f"{zeros[size] if crc is None else crc:0{_HEX}x}" for crc in crcs]
        sums = {"header": _header_crc(self._entries), "tensors": "".join(digits), "by_row": self._by_row}
        header = {METADATA: {"format": "pt", CHECKSUMS_KEY: json.dumps(sums)}, **self._entries}
        content = json.dumps(header).encode()
        content += b" " * (-len(content) % 8)
        return struct.pack("<Q", len(content)) + content


class RunningSums:
    """Computes the checksums of a tensor's units while its bytes are written in order."""

    def __init__(self, unit_bytes: int) -> None:
        self._unit_bytes = unit_bytes
        self._done = 0  # bytes of the current unit
        self._crc = 0
        self.crcs: list[int] = []

    def add(self, content: memoryview) -> None:
        while content:
            part = content[: self._unit_bytes - self._done]
            self._crc = zlib.crc32(part, self._crc)
            self._done += len(part)
            content = content[len(part) :]
            if self._done == self._unit_bytes:
                self.crcs.append(self._crc)
                self._done = self._crc = 0


def sums_of(content: memoryview, unit_bytes: int) -> list[int]:
    """Returns the checksums of whole units."""
    return [zlib.crc32(content[at : at + unit_bytes]) for at in range(0, len(content), unit_bytes)]


def read_checksums(header: Mapping[str, Any]) -> dict[str, TensorChecksums]:
    """Returns the checksums by key; none for a file that others wrote. Raises ValueError if the header is damaged."""
    text = header.get(METADATA, {}).get(CHECKSUMS_KEY)
    if text is None:
        return {}
    sums = json.loads(text)
    entries = {key: entry for key, entry in header.items() if key != METADATA}
    if sums["header"] != _header_crc(entries):
        raise ValueError("the header is not what was written")
    digits, by_row = str(sums["tensors"]), set(sums["by_row"])
    found, at = {}, 0
    for key, entry in entries.items():
        units = _units(key, entry, by_row)
        crcs = tuple(int(digits[i : i + _HEX], 16) for i in range(at, at + units * _HEX, _HEX))
        begin, end = entry["data_offsets"]
        found[key] = TensorChecksums(key=key, unit_bytes=(end - begin) // max(units, 1), crcs=crcs)
        at += units * _HEX
    if at != len(digits):
        raise ValueError("checksums of other tensors")
    return found


def json_crc(content: object) -> str:
    """Returns the CRC-32 of JSON content, independent of its formatting."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):0{_HEX}x}"


def _header_crc(entries: Mapping[str, Any]) -> str:
    return json_crc(entries)


def _units(key: str, entry: Mapping[str, Any], by_row: Collection[str]) -> int:
    return int(entry["shape"][0]) if key in by_row else 1


def _crc_of_zeros(num_bytes: int) -> int:
    crc, piece = 0, bytes(min(num_bytes, PIECE_BYTES))
    for at in range(0, num_bytes, PIECE_BYTES):
        crc = zlib.crc32(memoryview(piece)[: num_bytes - at], crc)
    return crc
