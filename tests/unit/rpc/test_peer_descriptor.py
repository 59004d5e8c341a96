"""A descriptor named by a peer on this host is opened exactly as checked, and only if it belongs to this user."""

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moecluster.rpc.same_host.mailbox import Mailbox, MailboxUnavailable, PeerMailbox
from moecluster.rpc.same_host.segment import MAILBOX, NAME, NONCE_BYTES, PeerSegment, Segment, SegmentUnavailable

NOBODY = 65533  # no user of this host
SEGMENT_BYTES = 2**16

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def after(monkeypatch: pytest.MonkeyPatch, step: str, swap: Callable[[], object]) -> None:
    """Replaces the file that the peer names right after a function of os has checked it."""
    real = getattr(os, step)

    def swapping(*arguments: object, **named: object) -> object:
        result = real(*arguments, **named)
        swap()
        return result

    monkeypatch.setattr(os, step, swapping)


@pytest.mark.parametrize("step", ["readlink", "fstat"])
def test_a_pipe_that_becomes_a_file_meanwhile_leaves_the_file_alone(tmp_path: Path, monkeypatch, step: str) -> None:
    """The file is one that this process may write and the peer may not."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    reading, writing = os.pipe()
    named = os.dup(writing)
    file = os.open(victim, os.O_WRONLY)
    looks = iter(range(100))

    def swap() -> None:
        # fstat is called on the process first, then on the named descriptor.
        if step == "readlink" or next(looks) == 1:
            os.dup2(file, named)

    with monkeypatch.context() as patched:
        after(patched, step, swap)
        try:
            peer = PeerMailbox(os.getpid(), named)
        except MailboxUnavailable:
            peer = None
    if peer is not None:
        peer.post(b"message")
        peer.close()
    os.close(file)
    assert victim.read_bytes() == b"precious"
    assert peer is not None and os.read(reading, 100) == b"message"  # the checked file is the one used
    for fd in (reading, writing, named):
        os.close(fd)


def test_a_segment_that_becomes_another_file_meanwhile_is_not_mapped(tmp_path: Path, monkeypatch) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * SEGMENT_BYTES)
    segment = Segment(SEGMENT_BYTES)
    named, file = os.dup(segment.fd), os.open(secret, os.O_RDONLY)
    with monkeypatch.context() as patched:
        after(patched, "readlink", lambda: os.dup2(file, named))
        peer = PeerSegment(os.getpid(), named, segment.size_bytes)
    assert peer.nonce == segment.nonce
    os.close(named)
    os.close(file)
    segment.close()


@pytest.mark.parametrize("kind", ["file", "fifo", "socket", "device", "folder", "memory"])
def test_what_is_no_pipe_is_refused_without_being_opened(tmp_path: Path, kind: str) -> None:
    """Opening alone may have effects: it wakes a FIFO's reader or triggers a device."""
    fifo = tmp_path / "pipe:[1]"  # named like a pipe
    os.mkfifo(fifo)
    open_one: dict[str, Callable[[], int]] = {
        "file": lambda: os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR),
        "fifo": lambda: os.open(fifo, os.O_RDWR),
        "socket": lambda: socket.socket().detach(),
        "device": lambda: os.open("/dev/null", os.O_RDWR),
        "folder": lambda: os.open(tmp_path, os.O_RDONLY),
        "memory": lambda: os.memfd_create("pipe:[1]"),
    }
    fd = open_one[kind]()
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(MailboxUnavailable, match=r"is no pipe|is of another user's file"):
        PeerMailbox(os.getpid(), fd)
    with pytest.raises(SegmentUnavailable, match=r"is no segment|is of another user's file"):
        PeerSegment(os.getpid(), fd, SEGMENT_BYTES)
    assert set(os.listdir("/proc/self/fd")) == before  # nothing stays open
    os.close(fd)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK])
def test_memory_that_its_owner_could_shrink_under_us_is_refused(seals: int) -> None:
    fd = os.memfd_create(NAME, os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SEGMENT_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(SegmentUnavailable, match="the segment is not sealed"):
        PeerSegment(os.getpid(), fd, SEGMENT_BYTES)
    os.close(fd)


@pytest.mark.parametrize("size_bytes", [0, NONCE_BYTES + MAILBOX.size, SEGMENT_BYTES + 1, 2**63])
def test_memory_of_another_size_than_announced_is_refused(size_bytes: int) -> None:
    segment = Segment(SEGMENT_BYTES)
    with pytest.raises(SegmentUnavailable, match="smaller than announced"):
        PeerSegment(os.getpid(), segment.fd, size_bytes)
    segment.close()


OTHERS = f"""
import fcntl, os, sys
who = int(sys.argv[1])
if who:
    os.setresgid(who, who, who)
    os.setresuid(who, who, who)
reading, writing = os.pipe()
memory = os.memfd_create({NAME!r}, os.MFD_ALLOW_SEALING)
os.ftruncate(memory, {SEGMENT_BYTES})
fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
print(reading, memory, flush=True)
sys.stdin.readline()
"""


@contextmanager
def another_process(uid: int) -> Iterator[tuple[int, int, int]]:
    """(pid, a pipe of it, a segment of it)."""
    command = [sys.executable, "-S", "-c", OTHERS, str(uid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        pipe, memory = map(int, process.stdout.readline().split())
        yield process.pid, pipe, memory
        process.stdin.close()


def test_of_another_process_of_this_user_they_are_taken() -> None:
    with another_process(0) as (pid, pipe, memory):
        PeerMailbox(pid, pipe).close()
        PeerSegment(pid, memory, SEGMENT_BYTES).close()


@needs_root
def test_of_another_users_process_nothing_is_opened() -> None:
    """Root could open everything."""
    with another_process(NOBODY) as (pid, pipe, memory):
        with pytest.raises(MailboxUnavailable, match=f"process {pid} is another user's"):
            PeerMailbox(pid, pipe)
        with pytest.raises(SegmentUnavailable, match=f"process {pid} is another user's"):
            PeerSegment(pid, memory, SEGMENT_BYTES)


@needs_root
def test_a_file_of_another_user_in_a_process_of_ours_is_not_opened() -> None:
    """Such a descriptor may be inherited, or received through a socket."""
    mailbox, memory = Mailbox(), os.memfd_create(NAME, os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, SEGMENT_BYTES)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    for fd in (mailbox.fd, memory):
        os.fchown(fd, NOBODY, NOBODY)
    with pytest.raises(MailboxUnavailable, match="is of another user's file"):
        PeerMailbox(os.getpid(), mailbox.fd)
    with pytest.raises(SegmentUnavailable, match="is of another user's file"):
        PeerSegment(os.getpid(), memory, SEGMENT_BYTES)
    mailbox.close()
    os.close(memory)


@pytest.mark.parametrize(("pid", "fd"), [(0, 0), (-1, 0), (2**31, 0), (None, -1), (None, 2**63)])
def test_numbers_that_name_nothing_are_refused(pid: int | None, fd: int) -> None:
    """pid: None for our own, which differs between the processes that run tests."""
    pid = os.getpid() if pid is None else pid
    with pytest.raises(MailboxUnavailable):
        PeerMailbox(pid, fd)
    with pytest.raises(SegmentUnavailable):
        PeerSegment(pid, fd, SEGMENT_BYTES)
