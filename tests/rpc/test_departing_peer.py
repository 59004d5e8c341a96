"""Calls that begin while their server stops: each ends, also streams."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from moecluster.rpc.server import open_channel, start_server

NAME, METHOD = "test.Streams", "Numbers"
ROUNDS = 1000  # with retries of gRPC's own, within some hundreds a call never ended
CALL_TIMEOUT_S = 5.0


def numbers(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from (b"1", b"2", b"3")


def add_numbers(server: grpc.Server) -> list[str]:
    methods: Any = {METHOD: grpc.unary_stream_rpc_method_handler(numbers)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, methods),))
    return [NAME]


@pytest.mark.timeout(120)
def test_a_stream_that_begins_while_its_server_stops_ends_in_time() -> None:
    for number in range(ROUNDS):
        server = start_server(add_numbers)
        with open_channel(server.address) as channel:
            ask: Any = channel.unary_stream(f"/{NAME}/{METHOD}")
            assert list(ask(b"", timeout=CALL_TIMEOUT_S)) == [b"1", b"2", b"3"]
            stopping = threading.Thread(target=server.stop, args=(0.0,))
            stopping.start()
            if number % 2:
                stopping.join()
            for _ in range(5):
                begun_s = time.monotonic()
                try:
                    assert list(ask(b"", timeout=CALL_TIMEOUT_S)) == [b"1", b"2", b"3"]
                except grpc.RpcError as exc:
                    assert exc.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED), exc
                assert time.monotonic() - begun_s < 2 * CALL_TIMEOUT_S
            stopping.join()
