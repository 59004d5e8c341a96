"""Rows in memory that two processes of one host share.

Each side writes only its own segment. A segment is a sealed memfd, which the peer opens through /proc/PID/fd/N: it has
no name, so nothing is left behind when a process is killed, and its seals keep the peer from shrinking it under a
reader. A region carries a sequence number in front of its payload and is used again only after the reader has released
it.
"""

import errno
import fcntl
import math
import mmap
import os
import secrets
import struct
import threading
from dataclasses import dataclass
from functools import partial

import torch

from moecluster.errors import InvalidMessage
from moecluster.proto import tensor_pb2
from moecluster.rpc.same_host.peer_descriptor import ForeignDescriptor, is_memory, opened_at_peer
from moecluster.rpc.shortage import is_shortage

NAME = "moecluster-rows"
NONCE_BYTES = 32
ALIGNMENT_BYTES = 64
HEADER = struct.Struct("<Q")
MAILBOX = struct.Struct("<Q")  # after the nonce: the descriptor of the owner's mailbox, 0 for none
REQUIRED_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class SegmentUnavailable(Exception):
    """The segment cannot be created or opened here; rows travel inline instead."""


class SegmentShortage(SegmentUnavailable):
    """There is no memory, or no descriptor, for a segment of our own now. Later there may be."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A written part of a segment: its payload starts ALIGNMENT_BYTES after offset."""

    offset: int
    length_bytes: int
    sequence: int


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _rows_at(memory: mmap.mmap, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The payload of the region at offset, in place."""
    size = math.prod(shape)
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=size, offset=offset + ALIGNMENT_BYTES).view(shape)


def _unavailable(error: OSError, size_bytes: int) -> SegmentUnavailable:
    if is_shortage(error) or error.errno in (errno.ENOSPC, errno.EFBIG):
        return SegmentShortage(f"{size_bytes} bytes of memory to share cannot be had ({error.strerror})")
    return SegmentUnavailable(str(error))


class Segment:
    """Our own segment: we write, the peer reads. Thread-safe."""

    def __init__(self, size_bytes: int) -> None:
        """Allocates all memory now, so that a full machine fails here and not with a SIGBUS later.

        Raises SegmentUnavailable, SegmentShortage.
        """
        self.size_bytes = _aligned(size_bytes)
        try:
            self.fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as exc:
            raise _unavailable(exc, self.size_bytes) from exc
        try:
            os.posix_fallocate(self.fd, 0, self.size_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, REQUIRED_SEALS | fcntl.F_SEAL_SEAL)
            memory = mmap.mmap(self.fd, self.size_bytes)
        except OSError as exc:
            os.close(self.fd)
            raise _unavailable(exc, self.size_bytes) from exc
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        memory[:NONCE_BYTES] = self.nonce
        self._map: mmap.mmap | None = memory  # None once closed
        self._lock = threading.Lock()
        self._free = [(_aligned(NONCE_BYTES), self.size_bytes - _aligned(NONCE_BYTES))]  # (offset, bytes), ascending
        self._used: dict[int, tuple[int, int]] = {}  # sequence -> (offset, bytes)
        self._sequence = 0

    def write(self, value: torch.Tensor) -> Region | None:
        """Copies a tensor into a free region. Returns None if there is no room now, or the segment is closed."""
        length_bytes = value.numel() * value.element_size()
        memory = self._map
        taken = self._take(ALIGNMENT_BYTES + _aligned(length_bytes))
        if memory is None or taken is None:
            return None
        sequence, offset = taken
        HEADER.pack_into(memory, offset, sequence)
        _rows_at(memory, offset, value.dtype, value.shape).copy_(value)
        return Region(offset=offset, length_bytes=length_bytes, sequence=sequence)

    def _take(self, size_bytes: int) -> tuple[int, int] | None:
        with self._lock:
            for i, (offset, free_bytes) in enumerate(self._free):
                if free_bytes >= size_bytes:
                    rest = (offset + size_bytes, free_bytes - size_bytes)
                    self._free[i : i + 1] = [rest] if rest[1] else []
                    self._sequence += 1
                    self._used[self._sequence] = (offset, size_bytes)
                    return self._sequence, offset
        return None

    def release(self, sequence: int) -> None:
        """Frees a region that the reader has released. Ignores unknown sequences: a release may arrive twice."""
        with self._lock:
            used = self._used.pop(sequence, None)
            if used is None:
                return
            merged: list[tuple[int, int]] = []
            for offset, size_bytes in sorted([*self._free, used]):
                if merged and sum(merged[-1]) == offset:
                    merged[-1] = (merged[-1][0], merged[-1][1] + size_bytes)
                else:
                    merged.append((offset, size_bytes))
            self._free = merged

    def announce_mailbox(self, fd: int) -> None:
        """Writes our mailbox's descriptor into the segment, for the peer that opens it later."""
        assert self._map is not None
        MAILBOX.pack_into(self._map, NONCE_BYTES, fd)

    def offer(self) -> tensor_pb2.SegmentOffer:
        """Returns what the peer needs to open this segment."""
        return tensor_pb2.SegmentOffer(pid=os.getpid(), fd=self.fd, size_bytes=self.size_bytes)

    def close(self) -> None:
        """Closes our descriptor and drops our mapping; the memory is freed with its last mapping. Idempotent.

        A reference to this object does not keep the memory: the traceback of an ended stream may hold both its ends for
        long.
        """
        with self._lock:
            fd, self.fd = self.fd, -1
            self._map = None
        if fd >= 0:
            os.close(fd)


class PeerSegment:
    """A peer's segment, mapped read-only. Thread-safe."""

    def __init__(self, pid: int, fd: int, size_bytes: int) -> None:
        """Raises SegmentUnavailable if there is no such sealed segment of this user on this host."""
        try:
            # Checked before it is opened: a caller may name any descriptor of any process.
            with opened_at_peer(pid, fd, "segment", partial(is_memory, wanted=NAME)) as path:
                opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except ForeignDescriptor as exc:
            raise SegmentUnavailable(str(exc)) from exc
        except OSError as exc:
            raise SegmentUnavailable(errno.errorcode.get(exc.errno or 0, "error")) from exc
        try:
            if fcntl.fcntl(opened, fcntl.F_GET_SEALS) & REQUIRED_SEALS != REQUIRED_SEALS:
                raise SegmentUnavailable("the segment is not sealed")
            if not NONCE_BYTES + MAILBOX.size < size_bytes <= os.fstat(opened).st_size:
                raise SegmentUnavailable("the segment is smaller than announced")
            memory = mmap.mmap(opened, size_bytes, prot=mmap.PROT_READ)
        except OSError as exc:
            raise SegmentUnavailable(str(exc)) from exc
        finally:
            os.close(opened)
        self.size_bytes = size_bytes
        self.nonce = memory[:NONCE_BYTES]
        self.mailbox_fd: int = MAILBOX.unpack_from(memory, NONCE_BYTES)[0]
        self._map: mmap.mmap | None = memory  # None once closed

    def check(self, region: Region) -> None:
        """Raises InvalidMessage if the region does not hold its sequence. Call it before and after reading."""
        self._checked(region)

    def view(self, region: Region, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns the region's payload in place, valid until the region is released. Never write to it."""
        assert region.length_bytes == math.prod(shape) * dtype.itemsize
        return _rows_at(self._checked(region), region.offset, dtype, shape)

    def close(self) -> None:
        """Drops the mapping; it is unmapped once its last view is gone."""
        self._map = None

    def _checked(self, region: Region) -> mmap.mmap:
        memory = self._map
        if memory is None:
            raise InvalidMessage("region", "of a segment that is closed")
        end = region.offset + ALIGNMENT_BYTES + region.length_bytes
        if region.offset < NONCE_BYTES + MAILBOX.size or region.offset % ALIGNMENT_BYTES or end > self.size_bytes:
            raise InvalidMessage("region", f"bytes {region.offset} to {end} lie outside the segment")
        if HEADER.unpack_from(memory, region.offset)[0] != region.sequence:
            raise InvalidMessage("region", f"sequence {region.sequence} was overwritten")
        return memory
