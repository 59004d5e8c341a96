"""Generates the choices of one request concurrently and yields their chunks in the order in which they arrive."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from moecluster.errors import Exhausted
from moecluster.gateway.admission import Admission
from moecluster.gateway.served_model import ServedModel
from moecluster.generation import GenerationChunk, GenerationRequest

QUEUED_CHUNKS = 64  # beyond it generation waits for the client

_Item = tuple[int, GenerationChunk | Exception | None]  # None: this choice has ended


async def stream_all(
    model: ServedModel, requests: Sequence[GenerationRequest], admission: Admission
) -> AsyncGenerator[tuple[int, GenerationChunk]]:
    """Yields (index of the choice, its next chunk). Raises what a choice raises, and ApiError if there is no room.

    On an error, or when the generator is closed early, all choices end.
    """
    with admission.generating(len(requests)):
        if len(requests) == 1:
            async with aclosing(model.generate(requests[0])) as chunks:
                async for chunk in chunks:
                    yield 0, chunk
            return
        together = _Together(model, requests)
        try:
            while (item := await together.next()) is not None:
                yield item
        finally:
            await together.end()


class _Together:
    """Several choices. If the routers accept only some, the others wait; if they accept none, all fail."""

    def __init__(self, model: ServedModel, requests: Sequence[GenerationRequest]) -> None:
        self._model = model
        self._queue: asyncio.Queue[_Item] = asyncio.Queue(QUEUED_CHUNKS)
        self._begun = asyncio.Event()  # at least one choice
        self._refused = 0  # choices that wait for that
        self._running = len(requests)
        self._tasks = [asyncio.create_task(self._generate(i, request)) for i, request in enumerate(requests)]

    async def next(self) -> tuple[int, GenerationChunk] | None:
        """The next chunk of any choice; None when all have ended. Raises what a choice raises."""
        while self._running:
            index, item = await self._queue.get()  # every choice reports its end, within request_timeout_s
            if isinstance(item, Exception):
                raise item
            if item is not None:
                return index, item
            self._running -= 1
        return None

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _generate(self, index: int, request: GenerationRequest) -> None:
        try:
            try:
                await self._generate_once(index, request)
            except Exhausted:
                self._refused += 1
                if self._begun.is_set() or self._refused == len(self._tasks):
                    raise
                await self._begun.wait()  # if no choice begins, the first error of another one ends this one too
                await self._generate_once(index, request)
            await self._queue.put((index, None))
        except Exception as exc:  # raised by next()
            await self._queue.put((index, exc))

    async def _generate_once(self, index: int, request: GenerationRequest) -> None:
        async with aclosing(self._model.generate(request, begun=self._begun.is_set)) as chunks:
            async for chunk in chunks:
                self._begun.set()
                await self._queue.put((index, chunk))
