"""Checksums of what stands in a safetensors file of ours, kept in its own header.

The header's `__metadata__` has, under one key, a JSON object: `header`, the CRC-32 of what the header says of the
tensors; `tensors`, eight hex digits for every unit of every tensor, in the header's order; `by_row`, the tensors that
have a unit for each row of their first dimension, as experts are read by row. All other tensors are one unit. So each
reader checks just what it reads. Files without the key, which others wrote, are read unchecked. CRC-32 guards against
accidents only.
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
PIECE_BYTES = 2**20  # read, then summed up while it is in the processor's cache

_HEX = 8  # digits of a checksum


@dataclass(frozen=True, kw_only=True)
class TensorChecksums:
    """Of one tensor's units, which are equally long."""

    key: str
    unit_bytes: int
    crcs: tuple[int, ...]


class RunningCheck:
    """Follows a tensor's bytes from the beginning of a unit on."""

    def __init__(self, file: Path, sums: TensorChecksums, begin: int) -> None:
        """begin: of the first byte, counted from the tensor's first."""
        self._file, self._sums = file, sums
        self.at = begin
        self._crc = 0

    def add(self, content: memoryview) -> None:
        """The next bytes. Raises CheckpointError at the end of a unit that is not what was written."""
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
    """None where nothing is known of the bytes, or reading begins amid a unit."""
    if sums is None or not sums.unit_bytes or begin % sums.unit_bytes:
        return None
    return RunningCheck(file, sums, begin)


class SummedHeader:
    """The beginning of a file that is being written; as long before the checksums are known as afterwards."""

    def __init__(self, entries: Mapping[str, Mapping[str, Any]], by_row: Collection[str] = ()) -> None:
        """entries: key -> dtype, shape and data_offsets, as the format has them."""
        self._entries = {key: dict(entry) for key, entry in entries.items()}
        self._by_row = [key for key in self._entries if key in by_row]
        self._crcs: dict[str, list[int | None]] = {
            key: [None] * _units(key, entry, self._by_row) for key, entry in self._entries.items()
        }

    def set(self, key: str, crcs: Iterable[int], first: int = 0) -> None:
        """Checksums of the tensor's units from a row on."""
        for unit, crc in enumerate(crcs, start=first):
            self._crcs[key][unit] = crc

    def unit_bytes(self, key: str) -> int:
        begin, end = self._entries[key]["data_offsets"]
        return int(end - begin) // max(len(self._crcs[key]), 1)

    def to_bytes(self) -> bytes:
        """Size and header. What was never summed up counts as zeros."""
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
    """Checksums of a tensor's units while its bytes are written in their order."""

    def __init__(self, unit_bytes: int) -> None:
        self._unit_bytes = unit_bytes
        self._done = 0  # bytes of the unit that is under way
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
    """Checksums of whole units."""
    return [zlib.crc32(content[at : at + unit_bytes]) for at in range(0, len(content), unit_bytes)]


def read_checksums(header: Mapping[str, Any]) -> dict[str, TensorChecksums]:
    """By key; empty for a file of others. Raises ValueError if the header is not what was written."""
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
    """Of what a JSON file says, however it is laid out."""
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
