"""A Compute stream that sends arbitrary messages, and checks that the server still works."""

import queue
from typing import Any

import grpc
import torch

from moecluster.expert.service import ExpertService
from moecluster.proto import expert_pb2
from moecluster.proto.expert_pb2_grpc import ExpertServiceStub
from moecluster.rpc.expert import messages
from moecluster.rpc.same_host.segment import Segment
from tests.support.expert.small_actor import ask, batch_of

SERVICE = "moecluster.v1.ExpertService"
GOOD = messages.encode_batch(batch_of(5))


class RawStream:
    """A Compute stream that sends arbitrary messages."""

    def __init__(self, stub: ExpertServiceStub, segment: Segment | None = None) -> None:
        self._outbox: queue.SimpleQueue[expert_pb2.ComputeRequest | None] = queue.SimpleQueue()
        self._replies = stub.Compute(iter(self._outbox.get, None), timeout=60.0)
        hello = expert_pb2.Hello(router="test")
        if segment is not None:
            hello.segment.CopyFrom(segment.offer())
        self.send(expert_pb2.ComputeRequest(hello=hello))
        self.greeting = next(self._replies).hello

    def send(self, request: expert_pb2.ComputeRequest) -> None:
        self._outbox.put(request)

    def ask(self, batch: expert_pb2.Batch) -> expert_pb2.BatchReply:
        self.send(expert_pb2.ComputeRequest(batch=batch))
        return self.receive()

    def receive(self) -> expert_pb2.BatchReply:
        reply: expert_pb2.BatchReply = next(self._replies).batch
        return reply

    def ending(self) -> grpc.StatusCode:
        """Reads to the end of the stream; returns its status code."""
        try:
            for _ in self._replies:
                pass
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    def close(self) -> None:
        self._outbox.put(None)
        self._replies.cancel()


def check_serves(service: ExpertService, stub: ExpertServiceStub) -> None:
    """Asserts that the service answers a good batch bit for bit as it does in process."""
    stream = RawStream(stub)
    check_good_answer(service, stream)
    stream.close()


def check_good_answer(service: ExpertService, stream: RawStream) -> None:
    reply = stream.ask(GOOD)
    assert reply.code == expert_pb2.OK, reply.detail
    batch = messages.decode_batch(GOOD)
    y_ND = messages.decode_result(reply, batch).y_ND
    expected_ND = ask(service, batch).y_ND
    assert y_ND is not None and expected_ND is not None and torch.equal(y_ND, expected_ND)


def raw_compute(channel: grpc.Channel) -> Any:
    """Returns the Compute method for raw bytes."""
    return channel.stream_stream(f"/{SERVICE}/Compute", None, None)
