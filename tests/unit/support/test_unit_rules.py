"""Operations forbidden in unit tests fail, and those that event loops need are allowed."""

import asyncio
import socket
from collections.abc import Callable

import grpc
import pytest
import ray


@pytest.mark.parametrize(
    "forbidden",
    [
        pytest.param(lambda: ray.init(address="local"), id="ray"),
        pytest.param(lambda: grpc.insecure_channel("127.0.0.1:1"), id="grpc"),
        pytest.param(lambda: socket.create_connection(("127.0.0.1", 1)), id="connect"),
        pytest.param(lambda: socket.create_server(("127.0.0.1", 0)), id="listen"),
    ],
)
def test_ray_and_sockets_fail_the_test(forbidden: Callable[[], object]) -> None:
    with pytest.raises(pytest.fail.Exception, match="a unit test may not"):
        forbidden()


def test_an_event_loop_may_run() -> None:
    async def three() -> int:
        await asyncio.sleep(0)
        return 3

    assert asyncio.run(three()) == 3
