"""The router's side of the Compute stream to one expert actor."""

import itertools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError

from moecluster.errors import MoeClusterError, StaleRequest, Unavailable
from moecluster.proto import expert_pb2
from moecluster.proto.expert_pb2_grpc import ExpertServiceStub
from moecluster.rpc import tensors
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.expert import messages
from moecluster.rpc.same_host.mailbox import Mailbox, MailboxUnavailable, PeerMailbox
from moecluster.rpc.same_host.reply_reader import Answer, ReplyReaders
from moecluster.rpc.same_host.segment import PeerSegment, Segment, SegmentShortage, SegmentUnavailable
from moecluster.rpc.server import open_channel
from moecluster.rpc.status_codes import error_of_reply, from_rpc_error
from moecluster.types import ActorAddress, ComputeBatch, ComputeResult

MAX_REASON = 200  # characters that an actor may say of its shortage


@dataclass(frozen=True, kw_only=True)
class _Pending:
    batch: ComputeBatch
    regions: tuple[int, ...]  # sequence numbers in our segment, released by the reply
    answer: Answer


class GrpcExpertTransport:
    """One long-lived stream; messages are matched by request id. Thread-safe.

    Between processes of one host, short messages go through shared-memory mailboxes instead.
    """

    def __init__(
        self,
        address: ActorAddress,
        *,
        router: str,
        shared_memory_bytes: int,
        connect_timeout_s: float = 10.0,
        credentials: ClusterCredentials | None = None,
    ) -> None:
        """Opens the stream and does the handshake. shared_memory_bytes 0: inline only.

        Raises Unavailable if the actor does not answer in time, StaleRequest if another incarnation of it answers.
        """
        self.actor = address.actor
        self.name = "inline"
        self.shortage = ""
        self.reason = "no_memory" if shared_memory_bytes else "disabled"  # of this process; until the handshake
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._released: list[int] = []
        self._closed: MoeClusterError | None = None
        self._outbox: queue.SimpleQueue[expert_pb2.ComputeRequest | None] = queue.SimpleQueue()
        self._segment = self._make_segment(shared_memory_bytes)
        self._mailbox = self._make_mailbox(self._segment)
        self._peer_mailbox: PeerMailbox | None = None
        self._has_mail = False  # a message came through the mailbox, so the actor reads ours too
        self._readers = ReplyReaders(self._mailbox, self._take_message) if self._mailbox is not None else None
        self._use_segment = False
        self._peer: PeerSegment | None = None
        self._nonce = b""  # of the actor's segment, echoed once
        self._channel = open_channel(address.address, credentials)
        greeted: Future[expert_pb2.HelloReply] = Future()
        hello = expert_pb2.Hello(router=router)
        if self._segment is not None:
            hello.segment.CopyFrom(self._segment.offer())
        self._outbox.put(expert_pb2.ComputeRequest(hello=hello))
        replies = ExpertServiceStub(self._channel).Compute(iter(self._outbox.get, None))
        threading.Thread(target=self._read, args=(replies, greeted), name=f"stream-{self.actor}", daemon=True).start()
        try:
            self._agree(greeted.result(timeout=connect_timeout_s))
        except TimeoutError as exc:
            self.close()
            raise Unavailable(f"{self.actor} at {address.address} did not answer in {connect_timeout_s:g} s") from exc
        except MoeClusterError:
            self.close()
            raise
        if self._closed is not None:  # the stream broke during the handshake: close what was opened since
            self.close()
        if address.incarnation and address.incarnation != self.incarnation:
            self.close()
            raise StaleRequest(f"{self.actor} is incarnation {self.incarnation}, not {address.incarnation}")

    def _make_segment(self, size_bytes: int) -> Segment | None:
        if not size_bytes:
            return None
        try:
            return Segment(size_bytes)
        except SegmentUnavailable as exc:
            self.shortage = f"the router: {exc}" if isinstance(exc, SegmentShortage) else ""
            return None

    @staticmethod
    def _make_mailbox(segment: Segment | None) -> Mailbox | None:
        if segment is None:
            return None
        try:
            mailbox = Mailbox()
        except MailboxUnavailable:
            return None
        segment.announce_mailbox(mailbox.fd)
        return mailbox

    def _agree(self, reply: expert_pb2.HelloReply) -> None:
        """Uses shared memory for requests if the actor has read our segment's nonce; otherwise inline bytes."""
        self.incarnation = reply.incarnation
        if self._segment is None:
            return
        if reply.nonce != self._segment.nonce:
            self.shortage = f"the actor: {reply.shortage[:MAX_REASON]}" if reply.shortage else ""
            # Without a shortage the actor cannot read our memory: another host, container or user.
            self.reason = "no_memory" if reply.shortage else "not_shared"
            return
        self._use_segment = True
        self.name, self.reason = "shm", "replies_inline"
        try:
            self._peer = PeerSegment(reply.segment.pid, reply.segment.fd, reply.segment.size_bytes)
            self._nonce = self._peer.nonce
            self.reason = "best"
            if self._peer.mailbox_fd:
                self._peer_mailbox = PeerMailbox(reply.segment.pid, self._peer.mailbox_fd)
        except (SegmentUnavailable, MailboxUnavailable):
            pass  # then replies travel inline or on the stream, while requests use the segment

    def submit(self, batch: ComputeBatch) -> "Future[ComputeResult]":
        """Sends a batch. The future holds the result or a MoeClusterError.

        The caller must bound its wait, and close the transport after a timeout: its segment must not be reused.
        """
        answer = Answer(self._readers)
        message = messages.encode_batch(batch, self._segment if self._use_segment else None)
        message.request_id = next(self._ids)
        regions = (tensors.region_of(message.x), tensors.region_of(message.grad))
        pending = _Pending(batch=batch, regions=tuple(r.sequence for r in regions if r is not None), answer=answer)
        with self._lock:
            if self._closed is not None:
                answer.settle(self._closed)
                return answer
            self._pending[message.request_id] = pending
            message.released.extend(self._released)
            self._released.clear()
            message.segment_nonce, self._nonce = self._nonce, b""
            if not self._has_mail or self._peer_mailbox is None or not self._peer_mailbox.post_message(message):
                self._outbox.put(expert_pb2.ComputeRequest(batch=message))
        return answer

    def _take_message(self, content: bytes) -> None:
        try:
            message = expert_pb2.BatchReply.FromString(content)
        except DecodeError as exc:
            self._fail(Unavailable(f"the mailbox of the stream to {self.actor} holds no messages: {exc}"))
            return
        self._has_mail = True
        self._finish(message)

    def close(self) -> None:
        """Ends the stream; batches in flight fail with Unavailable."""
        self._fail(Unavailable(f"the stream to {self.actor} was closed"))
        self._outbox.put(None)
        self._channel.close()
        for held in (self._segment, self._peer, self._mailbox, self._peer_mailbox):
            if held is not None:
                held.close()

    def _read(self, replies: Iterator[expert_pb2.ComputeReply], greeted: "Future[expert_pb2.HelloReply]") -> None:
        error: MoeClusterError = Unavailable(f"{self.actor} ended the stream")
        try:
            for reply in replies:
                if reply.WhichOneof("kind") == "hello":
                    greeted.set_result(reply.hello)
                else:
                    self._finish(reply.batch)
        except grpc.RpcError as exc:
            error = from_rpc_error(exc, self.actor)
        if greeted.done():  # whatever the error was, the stream is unusable
            error = Unavailable(f"the stream to {self.actor} broke: {error}")
        else:
            greeted.set_exception(error)
        self._fail(error)
        self.close()  # now, not at the next submit: an actor that left gets none

    def _finish(self, message: expert_pb2.BatchReply) -> None:
        with self._lock:
            pending = self._pending.pop(message.request_id, None)
        if pending is None:
            return  # a late reply to an abandoned request
        if self._segment is not None:
            for sequence in pending.regions:
                self._segment.release(sequence)
        try:
            if message.code != expert_pb2.OK:
                raise error_of_reply(message)
            outcome: ComputeResult | MoeClusterError = messages.decode_result(
                message, pending.batch, self._peer, self._release
            )
        except MoeClusterError as exc:
            outcome = exc
        pending.answer.settle(outcome)

    def _release(self, sequence: int) -> None:
        with self._lock:
            self._released.append(sequence)

    def _fail(self, error: MoeClusterError) -> None:
        with self._lock:
            if self._closed is None:
                self._closed = error
            left, self._pending = self._pending, {}
        for pending in left.values():
            pending.answer.settle(error)
