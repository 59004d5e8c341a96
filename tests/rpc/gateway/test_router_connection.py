"""The gateway's connection to one router, and the effect of its end on running requests."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from moecluster.errors import Unavailable
from moecluster.gateway.router_connection import RouterConnection
from moecluster.generation import GenerationChunk, GenerationRequest
from tests.support.fakes.fake_router import FakeRouter

WAIT_S = 60.0
REQUEST = GenerationRequest(request_id="r", prompt="once", max_new_tokens=8)


@asynccontextmanager
async def way_to(router: FakeRouter) -> AsyncIterator[RouterConnection]:
    way = RouterConnection(router.address)
    try:
        yield way
    finally:
        await way.close()


async def read(way: RouterConnection, chunks: list[GenerationChunk]) -> None:
    async for chunk in way.generate(REQUEST, WAIT_S):
        chunks.append(chunk)


@asynccontextmanager
async def reading(way: RouterConnection) -> AsyncIterator[asyncio.Task[None]]:
    """A reader of a request that waits after its second token."""
    chunks: list[GenerationChunk] = []
    reader = asyncio.create_task(read(way, chunks))
    async with asyncio.timeout(WAIT_S):
        while len(chunks) < 2:
            await asyncio.sleep(0.01)
        yield reader


def test_a_request_over_a_closed_way_is_lost_and_its_reader_not_cancelled() -> None:
    async def run(router: FakeRouter) -> None:
        async with way_to(router) as way, reading(way) as reader:
            await way.close()
            with pytest.raises(Unavailable):
                await reader
            with pytest.raises(Unavailable):
                await read(way, [])

    with FakeRouter() as router:
        router.free_tokens = 2
        router.hold.clear()
        asyncio.run(run(router))


def test_a_cancelled_reader_stays_cancelled() -> None:
    async def run(router: FakeRouter) -> None:
        async with way_to(router) as way, reading(way) as reader:
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            while router.running:
                await asyncio.sleep(0.01)

    with FakeRouter() as router:
        router.free_tokens = 2
        router.hold.clear()
        asyncio.run(run(router))
