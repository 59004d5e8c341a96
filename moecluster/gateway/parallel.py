"""The texts of one request, written side by side: the pieces of all of them in the order in which they come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from moecluster.errors import Exhausted
from moecluster.gateway.served_model import ServedModel
from moecluster.generation import GenerationPiece, GenerationRequest

QUEUED_PIECES = 64  # beyond it the texts wait for the client

_Said = tuple[int, GenerationPiece | Exception | None]  # None: this text has ended


async def write_texts(
    model: ServedModel, requests: Sequence[GenerationRequest]
) -> AsyncGenerator[tuple[int, GenerationPiece]]:
    """(number of the text, its next piece). Raises what a text raises; then, or when it is left, all of them end."""
    if len(requests) == 1:
        async with aclosing(model.write(requests[0])) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    together = _Together(model, requests)
    try:
        async for index, piece in together.pieces():
            yield index, piece
    finally:
        await together.end()


class _Together:
    """Several texts. Where there is room for some of them only, the others wait; without room for any, all fail."""

    def __init__(self, model: ServedModel, requests: Sequence[GenerationRequest]) -> None:
        self._model = model
        self._queue: asyncio.Queue[_Said] = asyncio.Queue(QUEUED_PIECES)
        self._begun = asyncio.Event()  # one of them at least
        self._refused = 0  # texts that wait for that
        self._tasks = [asyncio.create_task(self._write(i, request)) for i, request in enumerate(requests)]

    async def pieces(self) -> AsyncGenerator[tuple[int, GenerationPiece]]:
        running = len(self._tasks)
        while running:
            index, said = await self._queue.get()  # every text says its end, and lasts request_timeout_s at most
            if isinstance(said, Exception):
                raise said
            if said is None:
                running -= 1
            else:
                yield index, said

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self, index: int, request: GenerationRequest) -> None:
        try:
            try:
                await self._write_once(index, request)
            except Exhausted:
                self._refused += 1
                if self._begun.is_set() or self._refused == len(self._tasks):
                    raise
                await self._begun.wait()  # if no other one begins, the first error of theirs ends this one too
                await self._write_once(index, request)
            await self._queue.put((index, None))
        except Exception as exc:  # told where the pieces are read
            await self._queue.put((index, exc))

    async def _write_once(self, index: int, request: GenerationRequest) -> None:
        async with aclosing(self._model.write(request, begun=self._begun.is_set)) as pieces:
            async for piece in pieces:
                self._begun.set()
                await self._queue.put((index, piece))
