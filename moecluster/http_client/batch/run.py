"""Runs a batch: sends its pending lines concurrently, and records each in the journal as it ends."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from moecluster.http_client.batch.journal import Journal, Output
from moecluster.http_client.batch.lines import BatchInput
from moecluster.http_client.batch.send import OnRefused, Retries, send_line


async def run_batch(
    batch: BatchInput,
    journal: Journal,
    gateway: httpx.AsyncClient,
    *,
    concurrency: int,
    retries: Retries,
    on_done: Callable[[Output], None],
    on_refused: OnRefused = lambda why: None,
) -> None:
    """Sends every pending line. on_done gets each one recorded in the journal; on_refused: see send_line.

    Raises Unavailable, ConfigError or ResourceError where continuing makes no sense; finished lines are kept.
    """
    pending = journal.pending()
    notes = _Notes(journal, on_done)

    async def work() -> None:
        for index in pending:  # shared by all workers
            await notes.add(index, await send_line(gateway, batch.line(index), retries, on_refused))

    workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(batch)))]
    try:
        await asyncio.gather(*workers)  # raises the first error
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await notes.write()


class _Notes:
    """Writes to the journal; lines that end during one write are grouped into the next."""

    def __init__(self, journal: Journal, on_done: Callable[[Output], None]) -> None:
        self._journal = journal
        self._on_done = on_done
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._writing = asyncio.Lock()

    async def add(self, index: int, output: dict[str, Any]) -> None:
        """Returns when the line is synced to disk."""
        self._waiting.append((index, output))
        await self.write()

    async def write(self) -> None:
        async with self._writing:
            if self._waiting:
                ended, self._waiting = self._waiting, []
                # Shielded: a cancelled worker must not abort the write, which others wait for.
                writing = asyncio.ensure_future(asyncio.to_thread(self._journal.append, ended))
                # Its error is not lost if nobody waits any more: the journal raises it again at the next write.
                writing.add_done_callback(lambda done: done.exception())
                await asyncio.shield(writing)
                for _, output in ended:
                    self._on_done(output)
