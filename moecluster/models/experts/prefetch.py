"""Reads several experts of a checkpoint at a time, ahead of the one that the caller is using.

Reading releases the GIL, so threads fill the queue of a disk or network, or use all cores when bytes come from the page
cache. The amount read ahead is bounded.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet

import torch
from torch import nn

from moecluster.models.experts.source import ExpertSource
from moecluster.types import ExpertId

READERS = 4
MAX_AHEAD_BYTES = 64 * 2**20  # of experts being read or waiting; two are always allowed
POLL_EVERY_S = 0.1  # how often `check` runs while an expert is being read


def read_ahead(
    source: ExpertSource,
    experts: Iterable[ExpertId],
    dtype: torch.dtype,
    *,
    check: Callable[[ExpertId], None] = lambda expert: None,
    readers: int = READERS,
    max_ahead_bytes: int = MAX_AHEAD_BYTES,
) -> Iterator[tuple[ExpertId, nn.Module]]:
    """Yields the experts in order. Takes each from `experts` when its read starts. Raises what loading it raises.

    check: called before an expert's read starts and while it is waited for. An exception from it ends the reading.
    """
    wanted = iter(experts)
    ahead: deque[tuple[ExpertId, int, Future[nn.Module]]] = deque()
    ahead_bytes = 0
    pool = ThreadPoolExecutor(max_workers=readers, thread_name_prefix="read-experts")
    try:
        while True:
            while len(ahead) < 2 or (len(ahead) < readers and ahead_bytes < max_ahead_bytes):
                expert = next(wanted, None)
                if expert is None:
                    break
                check(expert)
                ahead.append((expert, loaded_bytes(source, expert, dtype), pool.submit(source.load, expert, dtype)))
                ahead_bytes += ahead[-1][1]
            if not ahead:
                return
            expert, num_bytes, reading = ahead.popleft()
            module = _wait(reading, expert, check)
            del reading  # it references the module, which the caller may unload before asking for the next one
            ahead_bytes -= num_bytes
            yield expert, module
            del module
    finally:
        # A hanging read must not block a caller that has given up.
        pool.shutdown(wait=False, cancel_futures=True)


def loaded_bytes(source: ExpertSource, expert: ExpertId, dtype: torch.dtype) -> int:
    """Returns the bytes that the expert takes once loaded."""
    return sum(math.prod(value.shape) for value in source.empty(expert).parameters()) * dtype.itemsize


def _wait(reading: "Future[nn.Module]", expert: ExpertId, check: Callable[[ExpertId], None]) -> nn.Module:
    while True:
        try:
            return reading.result(POLL_EVERY_S)
        except NotYet:
            check(expert)
