"""Short messages between processes of one host arrive whole or not at all, and posting never blocks."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from moecluster.rpc.same_host.mailbox import MAX_MESSAGE_BYTES, Mailbox, MailboxUnavailable, PeerMailbox
from tests.support.waiting import wait_until

JOIN_S = 10.0


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    with closing(Mailbox()) as mailbox:
        yield mailbox


@pytest.fixture
def peer(mailbox: Mailbox) -> Iterator[PeerMailbox]:
    with closing(PeerMailbox(os.getpid(), mailbox.fd)) as peer:
        yield peer


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def receiving(mailbox: Mailbox) -> tuple[threading.Thread, list[bytes | None]]:
    """A thread that waits for one message, and the message it got."""
    got: list[bytes | None] = []
    thread = threading.Thread(target=lambda: got.append(mailbox.receive()))
    thread.start()
    wait_until(lambda: mailbox.reading, "the wait of the thread")
    return thread, got


def test_letters_come_one_by_one_in_their_order(mailbox: Mailbox, peer: PeerMailbox) -> None:
    messages = [b"a", b"", b"\0\0", b"x" * MAX_MESSAGE_BYTES]
    assert all(peer.post(message) for message in messages)
    assert [mailbox.receive(JOIN_S) for _ in range(3)] == [b"a", b"\0\0", b"x" * MAX_MESSAGE_BYTES]
    assert mailbox.receive(0.0) is None, "an empty message is none"


def test_who_waits_is_woken_by_a_letter(mailbox: Mailbox, peer: PeerMailbox) -> None:
    thread, got = receiving(mailbox)
    assert peer.post(b"message")
    thread.join(JOIN_S)
    assert got == [b"message"]


def test_a_wait_ends_with_its_timeout(mailbox: Mailbox) -> None:
    started_s = time.monotonic()
    assert mailbox.receive(0.05) is None
    assert 0.04 < time.monotonic() - started_s < JOIN_S


def test_a_ring_ends_one_wait(mailbox: Mailbox, peer: PeerMailbox) -> None:
    thread, got = receiving(mailbox)
    mailbox.wake()
    thread.join(JOIN_S)
    assert got == [None]
    mailbox.wake()
    assert peer.post(b"after")
    assert mailbox.receive(JOIN_S) is None and mailbox.receive(JOIN_S) == b"after"


def test_what_does_not_fit_is_refused_at_once_and_hurts_nothing(mailbox: Mailbox, peer: PeerMailbox) -> None:
    assert not peer.post(b"x" * (MAX_MESSAGE_BYTES + 1))
    count = 0
    while peer.post(b"%d" % count):
        count += 1
    assert count >= 8
    mailbox.wake()  # never blocks either
    assert mailbox.receive(0.0) == b"0"
    assert peer.post(b"last")
    assert [mailbox.receive(0.0) for _ in range(count)] == [*(b"%d" % i for i in range(1, count)), b"last"]


def test_letters_of_many_threads_stay_whole(mailbox: Mailbox, peer: PeerMailbox) -> None:
    def write(author: int) -> None:
        for size in range(50):
            message = bytes([author]) * (1 + 70 * size)
            while not peer.post(message):
                time.sleep(0.001)

    authors = [threading.Thread(target=write, args=(author,)) for author in range(1, 5)]
    for thread in authors:
        thread.start()
    messages = [mailbox.receive(JOIN_S) for _ in range(200)]
    for thread in authors:
        thread.join(JOIN_S)
    expected = [bytes([author]) * (1 + 70 * size) for author in range(1, 5) for size in range(50)]
    for author in range(1, 5):
        assert [x for x in messages if x is not None and x[0] == author] == [x for x in expected if x[0] == author]


def test_closing_ends_who_waits_and_gives_descriptors_back() -> None:
    before = open_descriptors()
    mailbox = Mailbox()
    peer = PeerMailbox(os.getpid(), mailbox.fd)
    thread, got = receiving(mailbox)
    mailbox.close()
    mailbox.close()
    thread.join(JOIN_S)
    assert got == [None] and mailbox.closed and mailbox.receive() is None
    mailbox.wake()
    assert not peer.post(b"too late")
    peer.close()
    peer.close()
    assert not peer.post(b"much too late")
    assert open_descriptors() == before


OWNER = """
import sys, time
from moecluster.rpc.same_host.mailbox import Mailbox
mailbox = Mailbox()
print(mailbox.fd, flush=True)
print(mailbox.receive().decode(), flush=True)
time.sleep(60)
"""


def test_a_process_posts_to_another_until_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        peer = PeerMailbox(owner.pid, int(owner.stdout.readline()))
        assert peer.post(b"hello")
        assert owner.stdout.readline() == "hello\n"
        owner.kill()
        owner.wait(JOIN_S)
    assert not peer.post(b"gone")
    peer.close()


@pytest.mark.parametrize(
    "opened",
    [
        lambda path: os.open(path, os.O_CREAT | os.O_RDWR),
        lambda path: os.open("/dev/null", os.O_RDWR),
        lambda path: os.memfd_create("no-pipe"),
        lambda path: os.open(path.parent, os.O_RDONLY),
    ],
    ids=["file", "device", "memfd", "directory"],
)
def test_what_is_no_pipe_is_not_opened(tmp_path: Path, opened: Callable[[Path], int]) -> None:
    descriptor = opened(tmp_path / "file")
    before = open_descriptors()
    with pytest.raises(MailboxUnavailable, match="is no pipe"):
        PeerMailbox(os.getpid(), descriptor)
    assert open_descriptors() == before
    os.close(descriptor)


@pytest.mark.parametrize(("pid", "fd"), [(2**31 - 1, 3), (-1, -1), (0, 2**64 - 1), (2**62, 5)])
def test_what_is_not_there_is_unavailable(pid: int, fd: int) -> None:
    with pytest.raises(MailboxUnavailable):
        PeerMailbox(pid, fd)
