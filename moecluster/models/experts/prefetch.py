"""Experts out of a checkpoint, several being read at a time: the next ones while the last one is put to use.

Reading releases Python's lock, so threads fill a disk's queue, or a network's, and all cores where bytes come from the
page cache. What is read ahead stays bounded.
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
MAX_AHEAD_BYTES = 64 * 2**20  # of experts that are read or wait, beside the first two
LOOK_EVERY_S = 0.1  # whether the reading is still wanted, while nothing comes


def read_ahead(
    source: ExpertSource,
    experts: Iterable[ExpertId],
    dtype: torch.dtype,
    *,
    check: Callable[[ExpertId], None] = lambda expert: None,
    readers: int = READERS,
    max_ahead_bytes: int = MAX_AHEAD_BYTES,
) -> Iterator[tuple[ExpertId, nn.Module]]:
    """The experts in their order, which is taken as they are begun. Raises what loading the next one raises.

    check is asked before an expert is begun and while it is waited for; what it raises ends the reading.
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
            del reading  # it holds the module, which may be unloaded before the next one is there
            ahead_bytes -= num_bytes
            yield expert, module
            del module
    finally:
        # A read that hangs must not keep who has given up on it.
        pool.shutdown(wait=False, cancel_futures=True)


def loaded_bytes(source: ExpertSource, expert: ExpertId, dtype: torch.dtype) -> int:
    """Bytes that the expert takes once it is loaded."""
    return sum(math.prod(value.shape) for value in source.empty(expert).parameters()) * dtype.itemsize


def _wait(reading: "Future[nn.Module]", expert: ExpertId, check: Callable[[ExpertId], None]) -> nn.Module:
    while True:
        try:
            return reading.result(LOOK_EVERY_S)
        except NotYet:
            check(expert)
