"""The front's way to one router: what its end means to those who read a text over it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from moecluster.errors import Unavailable
from moecluster.gateway.router_connection import KnownRouter
from moecluster.generation import GenerationPiece, GenerationRequest
from tests.support.fakes.scripted_router import ScriptedRouter

WAIT_S = 60.0
REQUEST = GenerationRequest(request_id="r", prompt="once", max_new_tokens=8)


@asynccontextmanager
async def way_to(router: ScriptedRouter) -> AsyncIterator[KnownRouter]:
    way = KnownRouter(router.address)
    try:
        yield way
    finally:
        await way.close()


async def read(way: KnownRouter, pieces: list[GenerationPiece]) -> None:
    async for piece in way.generate(REQUEST, WAIT_S):
        pieces.append(piece)


@asynccontextmanager
async def reading(way: KnownRouter) -> AsyncIterator[asyncio.Task[None]]:
    """Whoever reads a text that waits behind its second token."""
    pieces: list[GenerationPiece] = []
    reader = asyncio.create_task(read(way, pieces))
    async with asyncio.timeout(WAIT_S):
        while len(pieces) < 2:
            await asyncio.sleep(0.01)
        yield reader


def test_a_text_over_a_closed_way_is_lost_and_its_reader_not_cancelled() -> None:
    async def run(router: ScriptedRouter) -> None:
        async with way_to(router) as way, reading(way) as reader:
            await way.close()
            with pytest.raises(Unavailable):
                await reader
            with pytest.raises(Unavailable):
                await read(way, [])

    with ScriptedRouter() as router:
        router.free_tokens = 2
        router.hold.clear()
        asyncio.run(run(router))


def test_a_cancelled_reader_stays_cancelled() -> None:
    async def run(router: ScriptedRouter) -> None:
        async with way_to(router) as way, reading(way) as reader:
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            while router.running:
                await asyncio.sleep(0.01)

    with ScriptedRouter() as router:
        router.free_tokens = 2
        router.hold.clear()
        asyncio.run(run(router))
