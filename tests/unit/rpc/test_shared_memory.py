"""A segment's allocator, what a peer may open, and that a killed process leaves nothing behind."""

import fcntl
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from moecluster.errors import InvalidMessage
from moecluster.rpc.same_host.segment import (
    ALIGNMENT_BYTES,
    NAME,
    REQUIRED_SEALS,
    PeerSegment,
    Region,
    Segment,
    SegmentUnavailable,
)

SEGMENT_BYTES = 4096
ROOM_BYTES = SEGMENT_BYTES - ALIGNMENT_BYTES  # all but the nonce


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment(SEGMENT_BYTES)
    yield segment
    segment.close()


def peer_of(segment: Segment) -> PeerSegment:
    return PeerSegment(os.getpid(), segment.fd, segment.size_bytes)


def descriptors() -> set[str]:
    gc.collect()  # segments of earlier tests hold descriptors
    return set(os.listdir("/proc/self/fd"))


def span(region: Region) -> tuple[int, int]:
    """[begin, end) of header and payload in bytes."""
    return region.offset, region.offset + ALIGNMENT_BYTES + region.length_bytes


class Allocator(RuleBasedStateMachine):
    """Any order of writes and releases, checked through the peer's mapping."""

    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.segment = Segment(SEGMENT_BYTES)
        self.peer = peer_of(self.segment)
        self.regions: dict[int, tuple[Region, torch.Tensor]] = {}

    @rule(target=live, size_bytes=st.integers(0, 1500), value=st.integers(0, 255))
    def write(self, size_bytes: int, value: int) -> object:
        content_U = torch.full((size_bytes,), value, dtype=torch.uint8)
        region = self.segment.write(content_U)
        if region is None:
            used_bytes = sum(span(region)[1] - span(region)[0] for region, _ in self.regions.values())
            assert used_bytes + size_bytes > 0 and self.regions, "an empty segment has room"
            return multiple()
        assert region.sequence not in self.regions
        self.regions[region.sequence] = (region, content_U)
        return region.sequence

    @rule(sequence=consumes(live))
    def release(self, sequence: int) -> None:
        self.segment.release(sequence)
        self.segment.release(sequence)  # a release may be repeated
        del self.regions[sequence]

    @invariant()
    def regions_are_aligned_apart_and_unharmed(self) -> None:
        spans = sorted(span(region) for region, _ in self.regions.values())
        assert all(begin % ALIGNMENT_BYTES == 0 and begin >= ALIGNMENT_BYTES for begin, _ in spans)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
        assert not spans or spans[-1][1] <= SEGMENT_BYTES
        for region, content_U in self.regions.values():
            assert torch.equal(self.peer.view(region, torch.uint8, tuple(content_U.shape)), content_U)
        assert self.peer.nonce == self.segment.nonce

    def teardown(self) -> None:
        for sequence in self.regions:
            self.segment.release(sequence)
        # Free regions have merged again: one region takes all.
        assert self.segment.write(torch.zeros(ROOM_BYTES - ALIGNMENT_BYTES, dtype=torch.uint8)) is not None
        self.segment.close()


TestAllocator = Allocator.TestCase


@given(sizes=st.lists(st.integers(0, 900), min_size=1, max_size=40), data=st.data())
def test_a_full_segment_says_so_and_every_release_makes_room(sizes: list[int], data: st.DataObject) -> None:
    segment = Segment(SEGMENT_BYTES)
    live = [region for size in sizes if (region := segment.write(torch.zeros(size, dtype=torch.uint8))) is not None]
    while segment.write(torch.zeros(0)) is not None:
        pass  # until nothing fits
    for region in data.draw(st.permutations(live)):
        segment.release(region.sequence)
        again = segment.write(torch.zeros(region.length_bytes, dtype=torch.uint8))
        assert again is not None and again.sequence > region.sequence
    segment.close()


def test_a_region_is_used_again_only_after_its_release(segment: Segment) -> None:
    size = 30 * ALIGNMENT_BYTES - 7  # two of them, rounded up and with headers, leave less than a header and a row
    first = segment.write(torch.ones(size, dtype=torch.uint8))
    second = segment.write(torch.ones(size, dtype=torch.uint8))
    assert first is not None and second is not None
    assert segment.write(torch.ones(1)) is None
    segment.release(first.sequence)
    third = segment.write(torch.ones(1))
    assert third is not None and third.offset == first.offset and third.sequence > second.sequence
    segment.release(first.sequence)  # late and repeated: the region belongs to another write now
    fourth = segment.write(torch.ones(1))
    assert fourth is not None and fourth.offset != third.offset


def test_more_than_the_segment_never_fits(segment: Segment) -> None:
    assert segment.write(torch.zeros(SEGMENT_BYTES, dtype=torch.uint8)) is None
    assert segment.write(torch.zeros(ROOM_BYTES - ALIGNMENT_BYTES, dtype=torch.uint8)) is not None


def test_threads_do_not_write_over_each_other() -> None:
    segment = Segment(64 * 1024)
    peer = peer_of(segment)
    wrong: list[int] = []

    def work(value: int) -> None:
        for _ in range(100):
            content_U = torch.full((1000,), value, dtype=torch.uint8)
            region = segment.write(content_U)
            if region is None:
                continue
            if not torch.equal(peer.view(region, torch.uint8, (1000,)), content_U):
                wrong.append(value)
            segment.release(region.sequence)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert segment.write(torch.zeros(64 * 1024 - 2 * ALIGNMENT_BYTES, dtype=torch.uint8)) is not None
    segment.close()


def test_a_segment_is_sealed_at_its_size_and_has_its_memory(segment: Segment) -> None:
    assert fcntl.fcntl(segment.fd, fcntl.F_GET_SEALS) & REQUIRED_SEALS == REQUIRED_SEALS
    for size_bytes in (SEGMENT_BYTES - 1, SEGMENT_BYTES + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size_bytes)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert os.fstat(segment.fd).st_blocks * 512 >= SEGMENT_BYTES


def test_where_memory_is_refused_the_segment_is_unavailable_and_nothing_stays_open() -> None:
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SEGMENT_BYTES, hard))
    try:
        with pytest.raises(SegmentUnavailable):
            Segment(2 * SEGMENT_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert descriptors() == before


def test_the_peer_maps_read_only_and_gives_everything_back_with_the_object(segment: Segment) -> None:
    before = descriptors()
    peer = peer_of(segment)
    inode = str(os.fstat(segment.fd).st_ino)
    mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if NAME in line]
    assert sorted(fields[1] for fields in mappings if fields[4] == inode) == ["r--s", "rw-s"]
    assert peer.size_bytes == SEGMENT_BYTES and peer.nonce == segment.nonce and len(peer.nonce) == 32
    del peer
    assert descriptors() == before


def test_a_segment_that_two_threads_close_is_closed_once() -> None:
    """A second close could hit a reused descriptor number."""
    for _ in range(100):
        segment, both = Segment(SEGMENT_BYTES), threading.Barrier(2)

        def close(segment: Segment = segment, both: threading.Barrier = both) -> None:
            both.wait()
            segment.close()

        with ThreadPoolExecutor(2) as closers:
            for closing in [closers.submit(close) for _ in range(2)]:
                closing.result()
        assert segment.fd == -1


def test_two_segments_have_different_nonces(segment: Segment) -> None:
    other = Segment(SEGMENT_BYTES)
    assert other.nonce != segment.nonce
    other.close()
    other.close()
    assert other.fd == -1


# What a malicious or faulty peer may name instead of a segment: (descriptor, expected error).


def plain_file(stack: ExitStack, folder: Path) -> int:
    path = folder / NAME
    path.write_bytes(b"secret" * 1000)
    return stack.enter_context(path.open("rb")).fileno()


def deleted_file_of_that_name(stack: ExitStack, folder: Path) -> int:
    descriptor = plain_file(stack, folder)
    (folder / NAME).unlink()
    return descriptor


def a_pipe(stack: ExitStack, folder: Path) -> int:
    read_end, write_end = os.pipe()
    stack.callback(os.close, read_end)
    stack.callback(os.close, write_end)
    return read_end


def a_fifo(stack: ExitStack, folder: Path) -> int:
    os.mkfifo(folder / "fifo")
    descriptor = os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    stack.callback(os.close, descriptor)
    return descriptor


def a_socket(stack: ExitStack, folder: Path) -> int:
    return stack.enter_context(socket.socket(socket.AF_UNIX)).fileno()


def another_memfd(stack: ExitStack, folder: Path) -> int:
    descriptor = os.memfd_create("of-someone-else", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SEGMENT_BYTES)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, REQUIRED_SEALS)
    stack.callback(os.close, descriptor)
    return descriptor


@pytest.mark.parametrize(
    "make", [plain_file, deleted_file_of_that_name, a_pipe, a_fifo, a_socket, another_memfd], ids=lambda f: f.__name__
)
def test_what_is_no_segment_is_refused_without_being_opened(
    make: Callable[[ExitStack, Path], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        descriptor = make(stack, tmp_path)
        opened: list[int] = []  # flags
        really_open = os.open

        def watched_open(path: str | Path, flags: int, **given: int) -> int:
            opened.append(flags)
            return really_open(path, flags, **given)

        monkeypatch.setattr(os, "open", watched_open)
        before = descriptors()
        with pytest.raises(SegmentUnavailable, match=f"descriptor {descriptor} of process {os.getpid()} is no segment"):
            PeerSegment(os.getpid(), descriptor, 1000)
        # O_PATH: held for checks, not opened.
        assert all(flags & os.O_PATH for flags in opened) and descriptors() == before


def test_an_unsealed_segment_is_refused_because_it_could_shrink_under_a_reader() -> None:
    descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SEGMENT_BYTES)
    before = descriptors()
    for seals in (0, fcntl.F_SEAL_GROW):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(SegmentUnavailable, match="not sealed"):
            PeerSegment(os.getpid(), descriptor, SEGMENT_BYTES)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert PeerSegment(os.getpid(), descriptor, SEGMENT_BYTES).size_bytes == SEGMENT_BYTES
    assert descriptors() == before
    os.close(descriptor)


@pytest.mark.parametrize(
    ("pid", "fd"),
    [
        pytest.param(2**31 - 1, 3, id="no such process"),
        pytest.param(-1, 3, id="a negative process"),
        pytest.param(0, 0, id="process 0"),
        pytest.param(os.getpid(), 10**6, id="no such descriptor"),
        pytest.param(os.getpid(), -1, id="a negative descriptor"),
    ],
)
def test_processes_and_descriptors_that_do_not_exist_are_unavailable(pid: int, fd: int) -> None:
    with pytest.raises(SegmentUnavailable):
        PeerSegment(pid, fd, SEGMENT_BYTES)


@pytest.mark.parametrize("size_bytes", [0, 32, SEGMENT_BYTES + 1, 2**40])
def test_a_segment_of_another_size_than_announced_is_refused(segment: Segment, size_bytes: int) -> None:
    with pytest.raises(SegmentUnavailable, match="smaller than announced"):
        PeerSegment(os.getpid(), segment.fd, size_bytes)


def test_the_nonce_is_not_a_region(segment: Segment) -> None:
    region = Region(offset=0, length_bytes=16, sequence=int.from_bytes(segment.nonce[:8], "little"))
    with pytest.raises(InvalidMessage, match="outside the segment"):
        peer_of(segment).view(region, torch.uint8, (16,))


OTHER_PROCESS = """
import sys
import torch
from moecluster.rpc.same_host.segment import Segment
segment = Segment(2**20)
region = segment.write(torch.arange(1000, dtype=torch.int32))
offer = segment.offer()
print(offer.pid, offer.fd, offer.size_bytes, region.offset, region.length_bytes, region.sequence, flush=True)
sys.stdin.read()
"""


def holders_of(inode: int) -> set[str]:
    """The processes, by id, that keep a memfd alive by a mapping or a descriptor."""
    holders = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile
            mappings = [line.split() for line in (process / "maps").read_text().splitlines() if NAME in line]
            holders |= {process.name for fields in mappings if fields[4] == str(inode)}
        for link in (process / "fd").glob("*"):
            with suppress(OSError):
                holders |= {process.name} if NAME in os.readlink(link) and link.stat().st_ino == inode else set()
    return holders


def test_a_killed_writer_leaves_a_readable_mapping_and_then_nothing() -> None:
    names_before = set(os.listdir("/dev/shm"))
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        pid, fd, size_bytes, offset, length_bytes, sequence = map(int, writer.stdout.readline().split())
        peer = PeerSegment(pid, fd, size_bytes)
        inode = os.stat(f"/proc/{pid}/fd/{fd}").st_ino
        assert holders_of(inode) == {str(pid), str(os.getpid())}
        writer.send_signal(signal.SIGKILL)
        assert writer.wait(timeout=10) == -signal.SIGKILL
    region = Region(offset=offset, length_bytes=length_bytes, sequence=sequence)
    assert torch.equal(peer.view(region, torch.int32, (1000,)), torch.arange(1000, dtype=torch.int32))
    assert holders_of(inode) == {str(os.getpid())}
    with pytest.raises(SegmentUnavailable):
        PeerSegment(pid, fd, size_bytes)

    del peer
    gc.collect()
    assert holders_of(inode) == set()
    assert not {name for name in set(os.listdir("/dev/shm")) - names_before if "moecluster" in name}
