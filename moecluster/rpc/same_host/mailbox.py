"""Short messages between two processes of one host, without sockets: they announce rows in shared memory.

A mailbox is a pipe in packet mode: each write is one message, written whole or not at all. The peer opens it through
/proc/PID/fd/N, as it does the segment, so nothing is left behind when a process is killed. A waiting reader sleeps. The
mailbox is only a shortcut: a message that is too long, or finds the mailbox full or gone, travels on the stream, which
also detects the end of the peer.
"""

import contextlib
import fcntl
import mmap
import os
import select
import threading

from google.protobuf.message import Message

from moecluster.rpc.same_host.peer_descriptor import is_pipe, opened_at_peer

MAX_MESSAGE_BYTES = select.PIPE_BUF
MAX_MESSAGES_READ = 64  # capacity: each message takes a page of the pipe
WAKE = b"\0"  # never a message: protobuf has no field number 0


class MailboxUnavailable(Exception):
    """The mailbox cannot be created or opened here; messages travel on the stream instead."""


class Mailbox:
    """Our own mailbox: the peer posts, and one of our threads at a time reads."""

    def __init__(self) -> None:
        try:
            self.fd, self._wake_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT)
        except OSError as exc:
            raise MailboxUnavailable(str(exc)) from exc
        with contextlib.suppress(OSError):  # a user above the limit for pipes keeps the default of 16 pages
            fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, MAX_MESSAGES_READ * mmap.PAGESIZE)
        self._poller = select.poll()
        self._poller.register(self.fd, select.POLLIN)
        self._lock = threading.Lock()
        self._reading = False
        self._closed = False

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """Returns the next message; None after the timeout (None: no timeout), after a wake, and once closed."""
        with self._lock:
            assert not self._reading, "one thread reads at a time"
            if self._closed:
                return None
            self._reading = True
        try:
            if not self._poller.poll(None if timeout_s is None else max(1e3 * timeout_s, 0.0)):
                return None
            message = os.read(self.fd, MAX_MESSAGE_BYTES)
            return message if message != WAKE else None
        finally:
            with self._lock:
                self._reading = False
                if self._closed:
                    self._close_descriptors()

    def wake(self) -> None:
        """Makes receive() return: the waiting call, or else the next."""
        with self._lock:
            if not self._closed:
                self._wake()

    def close(self) -> None:
        """Closes the mailbox and ends a waiting receive(). Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._reading:
                self._wake()  # the reader closes the descriptors: a number in use must not become another file's
            else:
                self._close_descriptors()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def reading(self) -> bool:
        """Whether a thread is in receive()."""
        return self._reading

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: the reader is not asleep
            os.write(self._wake_fd, WAKE)

    def _close_descriptors(self) -> None:
        os.close(self.fd)
        os.close(self._wake_fd)


class PeerMailbox:
    """A peer's mailbox, opened for writing. Thread-safe."""

    def __init__(self, pid: int, fd: int) -> None:
        """Raises MailboxUnavailable if there is no such pipe of this user on this host, or nobody reads it."""
        try:
            # Checked before it is opened: a caller may name any descriptor of any process.
            with opened_at_peer(pid, fd, "pipe", is_pipe) as path:
                self._fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT)
        except OSError as exc:
            raise MailboxUnavailable(str(exc)) from exc
        self._lock = threading.Lock()

    def post(self, message: bytes) -> bool:
        """Puts a message into the mailbox without blocking. Returns False if it is too long, or the mailbox is full or
        gone."""
        if len(message) > MAX_MESSAGE_BYTES:
            return False
        with self._lock:
            if self._fd < 0:
                return False
            try:
                os.write(self._fd, message)
            except (BlockingIOError, BrokenPipeError):
                return False
        return True

    def post_message(self, message: Message) -> bool:
        """Posts a protobuf message; serializes it only if it is short enough."""
        return message.ByteSize() <= MAX_MESSAGE_BYTES and self.post(message.SerializeToString())

    def close(self) -> None:
        """Closes the descriptor. Idempotent."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
