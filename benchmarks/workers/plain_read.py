"""Reading files as fast as they come, by `readinto`: what loading is measured against. Imports no torch."""

import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BUFFER_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Span:
    """When a reader began and ended, by the clock that all processes of a host share."""

    begin_s: float
    end_s: float
    num_bytes: int


def read_files(files: Sequence[Path], keep: bool) -> Span:
    """One file after the other, in order; keep: into fresh memory, else into one buffer that is used again."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    kept: list[mmap.mmap] = []
    num_bytes = 0
    begin_s = time.monotonic()
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while True:
                if keep:
                    fresh = mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                    kept.append(fresh)
                    count = handle.readinto(fresh)
                else:
                    count = handle.readinto(buffer)
                if not count:
                    break
                num_bytes += count
    end_s = time.monotonic()
    for fresh in kept:
        fresh.close()
    return Span(begin_s=begin_s, end_s=end_s, num_bytes=num_bytes)


def throw_out(files: Sequence[Path]) -> None:
    """Out of the page cache; what is not written yet would stay."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
