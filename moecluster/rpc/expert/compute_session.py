"""The server side of the Compute stream: one session for each stream that a router opens."""

import queue
import threading
from collections.abc import Iterator

import grpc
from google.protobuf.message import DecodeError

from moecluster.errors import InvalidMessage, MoeClusterError, StaleRequest
from moecluster.proto import expert_pb2
from moecluster.rpc import tensors
from moecluster.rpc.expert import messages
from moecluster.rpc.expert.interface import ComputeHandler
from moecluster.rpc.same_host.mailbox import Mailbox, MailboxUnavailable, PeerMailbox
from moecluster.rpc.same_host.segment import PeerSegment, Segment, SegmentShortage, SegmentUnavailable
from moecluster.rpc.status_codes import abort_with, reply_code_of
from moecluster.types import ComputeBatch, ComputeResult

MAX_SEGMENT_BYTES = 2**32


class ComputeSession:
    """One router's stream: decodes batches, submits them, and sends replies as they get ready."""

    def __init__(self, handler: ComputeHandler, requests: Iterator[expert_pb2.ComputeRequest]) -> None:
        self._handler = handler
        self._requests = requests
        self._outbox: queue.SimpleQueue[expert_pb2.ComputeReply | None] = queue.SimpleQueue()
        self._peer: PeerSegment | None = None
        self._segment: Segment | None = None
        self._segment_agreed = False
        self._mailbox: Mailbox | None = None
        self._peer_mailbox: PeerMailbox | None = None

    def replies(self, context: grpc.ServicerContext) -> Iterator[expert_pb2.ComputeReply]:
        """Yields the stream's replies, beginning with the reply to Hello."""
        first = next(self._requests, None)
        if first is None:
            return
        try:
            yield expert_pb2.ComputeReply(hello=self._greet(first))
            context.add_callback(self.end)
            threading.Thread(target=self._read, name="compute-stream", daemon=True).start()
            if self._mailbox is not None:
                threading.Thread(target=self._read_mailbox, name="compute-mailbox", daemon=True).start()
            while (reply := self._outbox.get()) is not None:  # end() is called when either side ends the stream
                yield reply
        except InvalidMessage as exc:  # from _greet
            abort_with(context, exc)
        finally:  # also if gRPC abandons the stream half-way
            for held in (self._segment, self._peer, self._mailbox, self._peer_mailbox):
                if held is not None:
                    held.close()

    def end(self) -> None:
        """Ends the stream of replies; batches still being computed get none."""
        self._outbox.put(None)

    def _greet(self, first: expert_pb2.ComputeRequest) -> expert_pb2.HelloReply:
        if first.WhichOneof("kind") != "hello":
            raise InvalidMessage("hello", "the first message of a stream must be one")
        reply = expert_pb2.HelloReply(incarnation=self._handler.incarnation)
        offer = first.hello.segment
        if not first.hello.HasField("segment"):
            return reply
        if offer.size_bytes > MAX_SEGMENT_BYTES:
            raise InvalidMessage("hello.segment.size_bytes", f"{offer.size_bytes}, at most {MAX_SEGMENT_BYTES}")
        try:
            self._peer = PeerSegment(offer.pid, offer.fd, offer.size_bytes)
            self._segment = Segment(offer.size_bytes)
        except SegmentUnavailable as exc:
            self._peer = None
            reply.shortage = str(exc) if isinstance(exc, SegmentShortage) else ""
            return reply  # without a nonce: rows travel inline
        self._open_mailboxes(offer.pid)
        reply.nonce = self._peer.nonce
        reply.segment.CopyFrom(self._segment.offer())
        return reply

    def _open_mailboxes(self, pid: int) -> None:
        assert self._peer is not None and self._segment is not None
        if not self._peer.mailbox_fd:
            return
        try:
            self._peer_mailbox = PeerMailbox(pid, self._peer.mailbox_fd)
            self._mailbox = Mailbox()
        except MailboxUnavailable:
            return
        self._segment.announce_mailbox(self._mailbox.fd)

    def _read(self) -> None:
        try:
            for request in self._requests:
                if request.WhichOneof("kind") != "batch":
                    raise InvalidMessage("batch", "a second hello")
                self._take(request.batch)
        except (grpc.RpcError, InvalidMessage):
            pass  # the router is gone or violates the protocol: either way the stream ends
        finally:
            self.end()

    def _read_mailbox(self) -> None:
        assert self._mailbox is not None
        try:
            while not self._mailbox.closed:
                message = self._mailbox.receive()
                waits = message is not None
                while message is not None:  # all pending messages, so that they are computed together
                    self._take(expert_pb2.Batch.FromString(message), wake=False)
                    message = self._mailbox.receive(0.0)
                if waits:
                    self._handler.compute_waiting()
        except DecodeError:
            pass  # as in _read
        finally:
            self.end()

    def _take(self, message: expert_pb2.Batch, *, wake: bool = True) -> None:
        if self._segment is not None:
            if message.segment_nonce:
                self._segment_agreed = message.segment_nonce == self._segment.nonce
            for sequence in message.released:
                self._segment.release(sequence)
        try:
            batch = messages.decode_batch(message, self._peer)
            if batch.incarnation and batch.incarnation != self._handler.incarnation:
                raise StaleRequest(f"this is incarnation {self._handler.incarnation}, not {batch.incarnation}")
        except MoeClusterError as exc:
            self._send_error(message.request_id, exc)
            return
        regions = [r for r in (tensors.region_of(message.x), tensors.region_of(message.grad)) if r is not None]

        def reply(outcome: ComputeResult | MoeClusterError) -> None:
            try:
                if self._peer is not None:
                    for region in regions:
                        self._peer.check(region)  # was not overwritten while it was read
                if isinstance(outcome, MoeClusterError):
                    self._send_error(message.request_id, outcome)
                else:
                    self._send_result(outcome, batch)
            except InvalidMessage as exc:
                self._send_error(message.request_id, exc)

        self._handler.submit(batch, reply, wake=wake)

    def _send_result(self, result: ComputeResult, batch: ComputeBatch) -> None:
        segment = self._segment if self._segment_agreed else None
        message = messages.encode_result(result, segment)
        message.placement_term, message.generation = batch.placement
        self._send(message)

    def _send_error(self, request_id: int, error: MoeClusterError) -> None:
        message = expert_pb2.BatchReply(request_id=request_id, code=reply_code_of(error), detail=str(error))
        placement = getattr(error, "placement", None)
        if placement is not None:
            message.placement_term, message.generation = placement
        self._send(message)

    def _send(self, message: expert_pb2.BatchReply) -> None:
        # The nonce proved that router and actor opened each other's segment, and so each other's mailbox.
        if not self._segment_agreed or self._peer_mailbox is None or not self._peer_mailbox.post_message(message):
            self._outbox.put(expert_pb2.ComputeReply(batch=message))
