"""Short messages between two processes of one host, past the sockets: they ring for rows that lie in shared memory.

A mailbox is a pipe in packet mode: a write is a letter, whole or not at all. The peer opens it through /proc/PID/fd/N,
as it does the segment, so nothing is left behind when a process is killed, and who waits for a letter sleeps. It is a
shortcut only: what is too long, or finds the mailbox full or gone, travels on the stream, which also notices when the
peer ends.
"""

import contextlib
import fcntl
import mmap
import os
import select
import threading

from google.protobuf.message import Message

from moecluster.rpc.same_host.peer_descriptor import is_pipe, opened_at_peer

MAX_LETTER_BYTES = select.PIPE_BUF
MAX_LETTERS = 64  # in one mailbox: each takes a page of the pipe, once it is written
RING = b"\0"  # no message: field number 0 does not exist


class MailboxUnavailable(Exception):
    """The mailbox cannot be made or opened here; messages travel on the stream instead."""


class Mailbox:
    """Our own mailbox: the peer posts, one thread of ours at a time reads."""

    def __init__(self) -> None:
        try:
            self.fd, self._ring_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT)
        except OSError as exc:
            raise MailboxUnavailable(str(exc)) from exc
        with contextlib.suppress(OSError):  # a user beyond the limit of all his pipes keeps the usual 16
            fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, MAX_LETTERS * mmap.PAGESIZE)
        self._poller = select.poll()
        self._poller.register(self.fd, select.POLLIN)
        self._lock = threading.Lock()
        self._reading = False
        self._closed = False

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """The next letter; None after the timeout (None: never), after a ring, and once it is closed."""
        with self._lock:
            assert not self._reading, "one thread reads at a time"
            if self._closed:
                return None
            self._reading = True
        try:
            if not self._poller.poll(None if timeout_s is None else max(1e3 * timeout_s, 0.0)):
                return None
            letter = os.read(self.fd, MAX_LETTER_BYTES)
            return letter if letter != RING else None
        finally:
            with self._lock:
                self._reading = False
                if self._closed:
                    self._close_descriptors()

    def ring(self) -> None:
        """Has receive() return: the one that waits, or else the next."""
        with self._lock:
            if not self._closed:
                self._ring()

    def close(self) -> None:
        """Ends the mailbox, and what waits in receive(). Again is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._reading:
                self._ring()  # the reader closes the descriptors: a number in use must not become another file's
            else:
                self._close_descriptors()

    @property
    def closed(self) -> bool:
        return self._closed

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: the reader is not asleep
            os.write(self._ring_fd, RING)

    def _close_descriptors(self) -> None:
        os.close(self.fd)
        os.close(self._ring_fd)


class PeerMailbox:
    """A peer's mailbox, opened for writing. Thread-safe."""

    def __init__(self, pid: int, fd: int) -> None:
        """Raises MailboxUnavailable if there is no such pipe of this user on this host, or nobody reads it."""
        try:
            # Looked at before it is opened: a caller may name any descriptor of any process.
            with opened_at_peer(pid, fd, "pipe", is_pipe) as path:
                self._fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT)
        except OSError as exc:
            raise MailboxUnavailable(str(exc)) from exc
        self._lock = threading.Lock()

    def post(self, letter: bytes) -> bool:
        """Puts a letter into the mailbox, never waiting. False if it is too long, or the mailbox full or gone."""
        if len(letter) > MAX_LETTER_BYTES:
            return False
        with self._lock:
            if self._fd < 0:
                return False
            try:
                os.write(self._fd, letter)
            except (BlockingIOError, BrokenPipeError):
                return False
        return True

    def post_message(self, message: Message) -> bool:
        """post() of a message's bytes, which are not even made if they are too many."""
        return message.ByteSize() <= MAX_LETTER_BYTES and self.post(message.SerializeToString())

    def close(self) -> None:
        """Gives the descriptor back, once."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
