"""Runs the event loop of an asynchronous command."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


def run_until_signalled(main: Coroutine[Any, Any, ResultT]) -> ResultT:
    """asyncio.run that SIGTERM ends as Ctrl-C does: by cancelling, so that every task cleans up.

    Raises SystemExit then; a signal handler that raised it inside a task would leave that task half done.
    """
    signalled = False

    async def run() -> ResultT:
        task = asyncio.current_task()
        assert task is not None

        def cancel() -> None:
            nonlocal signalled
            signalled = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, cancel)
        return await main

    before = signal.getsignal(signal.SIGTERM)
    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        if not signalled:
            raise
        sys.exit(128 + signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
