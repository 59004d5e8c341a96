"""What a process holds: memory, descriptors, shared memory."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 512  # the unit of st_blocks


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One process at one moment."""

    pss_bytes: int  # proportional set size: pages that others map too, as of a library, count in part
    own_bytes: int  # the part of it that is no file's
    descriptors: int
    shared_bytes: int  # in its memfds, whoever made them


def footprint(pid: int) -> Footprint:
    """Reads a process's footprint. Raises OSError if it is gone."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    names = os.listdir(f"/proc/{pid}/fd")
    memfds: dict[int, int] = {}
    for name in names:
        with suppress(OSError):  # closed meanwhile
            path = f"/proc/{pid}/fd/{name}"
            if os.readlink(path).startswith("/memfd:"):
                found = os.stat(path)
                memfds[found.st_ino] = found.st_blocks * BLOCK_BYTES
    pss_bytes, file_bytes = (int(fields[name].split()[0]) * 1024 for name in ("Pss", "Pss_File"))
    return Footprint(
        pss_bytes=pss_bytes,
        own_bytes=pss_bytes - file_bytes,
        descriptors=len(names),
        shared_bytes=sum(memfds.values()),
    )


def footprints(pids: Mapping[str, int]) -> dict[str, Footprint]:
    """Returns the footprint of every process, by name."""
    return {name: footprint(pid) for name, pid in pids.items()}


def shared_folder_bytes() -> int:
    """Returns the bytes in use of /dev/shm, files without a name among them, such as Ray's object stores."""
    found = os.statvfs("/dev/shm")
    return (found.f_blocks - found.f_bfree) * found.f_frsize
