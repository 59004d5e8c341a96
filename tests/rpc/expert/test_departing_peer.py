"""Calls that begin while their server stops: each of them ends, streams too."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc

from moecluster.rpc.server import open_channel, start_server

NAME, METHOD = "test.Streams", "Numbers"
ROUNDS = 1000  # with gRPC's own retries enabled, one of the calls never ended, in every trial
CALL_TIMEOUT_S = 30.0


def numbers(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from (b"1", b"2", b"3")


def add_numbers(server: grpc.Server) -> None:
    methods: Any = {METHOD: grpc.unary_stream_rpc_method_handler(numbers)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, methods),))


def test_a_stream_that_begins_while_its_server_stops_ends() -> None:
    for number in range(ROUNDS):
        server = start_server(NAME, add_numbers, credentials=None)
        with open_channel(server.address) as channel:
            ask: Any = channel.unary_stream(f"/{NAME}/{METHOD}")
            assert list(ask(b"", timeout=CALL_TIMEOUT_S)) == [b"1", b"2", b"3"]
            stopping = threading.Thread(target=server.stop, args=(0.0,))
            stopping.start()
            if number % 2:
                stopping.join()
            for _ in range(5):
                try:
                    assert list(ask(b"", timeout=CALL_TIMEOUT_S)) == [b"1", b"2", b"3"]
                except grpc.RpcError as exc:
                    assert exc.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED), exc
            stopping.join()
