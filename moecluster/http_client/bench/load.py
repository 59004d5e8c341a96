"""The two kinds of load: open loop (requests arrive by schedule) and closed loop (clients wait for their answers)."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator

from moecluster.http_client.bench.request import Measured, Sender
from moecluster.http_client.bench.workload import Ask

OnEnd = Callable[[Measured], None]


async def open_loop(
    sender: Sender,
    asks: Iterator[Ask],
    arrivals: Iterator[float],
    *,
    num_prompts: int | None,
    duration_s: float | None,
    on_end: OnEnd,
) -> list[Measured]:
    """Sends each request at its time, whatever happens to earlier ones. Returns all, once the last has ended."""
    started_s = time.perf_counter()

    async def send(ask: Ask, at_s: float) -> Measured:
        measured = await sender.send(ask, started_s=started_s, scheduled_s=at_s)
        on_end(measured)
        return measured

    sent = []
    async with asyncio.TaskGroup() as group:
        for at_s, ask in itertools.islice(zip(arrivals, asks, strict=False), num_prompts):
            if duration_s is not None and at_s > duration_s:
                break
            await asyncio.sleep(max(started_s + at_s - time.perf_counter(), 0.0))
            sent.append(group.create_task(send(ask, at_s)))
    return [task.result() for task in sent]


async def closed_loop(
    sender: Sender,
    asks: Iterator[Ask],
    *,
    concurrency: int,
    num_prompts: int | None,
    duration_s: float | None,
    on_end: OnEnd,
) -> list[Measured]:
    """Runs clients that each send their next request when the last has ended. Returns all in the order of ends."""
    started_s = time.perf_counter()
    to_come, ended = itertools.islice(asks, num_prompts), list[Measured]()

    async def client() -> None:
        for ask in to_come:  # shared by all clients
            if duration_s is not None and time.perf_counter() - started_s > duration_s:
                return
            measured = await sender.send(ask, started_s=started_s)
            ended.append(measured)
            on_end(measured)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return ended
