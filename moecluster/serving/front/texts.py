"""The texts of one request, written side by side: the pieces of all of them in the order in which they come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from moecluster.generations import GenerationPiece, GenerationRequest
from moecluster.serving.front.served_model import ServedModel

QUEUED_PIECES = 64  # beyond it the texts wait for the client

Said = tuple[int, GenerationPiece | Exception | None]  # None: this text has ended


async def write_texts(
    model: ServedModel, requests: Sequence[GenerationRequest]
) -> AsyncGenerator[tuple[int, GenerationPiece]]:
    """(number of the text, its next piece). Raises what a text raises; then, or when it is left, all of them end."""
    if len(requests) == 1:
        async with aclosing(model.write(requests[0])) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[Said] = asyncio.Queue(QUEUED_PIECES)
    begun = asyncio.Event()
    tasks = [asyncio.create_task(_write(model, i, request, begun, queue)) for i, request in enumerate(requests)]
    running = len(tasks)
    try:
        while running:
            index, said = await queue.get()
            if isinstance(said, Exception):
                raise said
            if said is None:
                running -= 1
                continue
            yield index, said
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _write(
    model: ServedModel, index: int, request: GenerationRequest, begun: asyncio.Event, queue: asyncio.Queue[Said]
) -> None:
    try:
        # Once one of the texts is begun, the others wait for room rather than end them all.
        async with aclosing(model.write(request, begun=begun.is_set)) as pieces:
            async for piece in pieces:
                begun.set()
                await queue.put((index, piece))
        await queue.put((index, None))
    except Exception as exc:  # told where the pieces are read
        await queue.put((index, exc))
