"""Memory of the process: for weights, and how much it takes in all.

Weights: one mapping per tensor, in huge pages, which returns to the system with its last reference. malloc keeps an
arena for each thread that reads experts, with holes where unloaded experts were; return_freed_memory returns what
reading, packing and unloading have freed. Huge pages: reading from the page cache into fresh 4 KB pages spends half its
time in the kernel's page allocation.
"""

import ctypes
import math
import mmap
from contextlib import suppress

import psutil
import torch

MIN_BYTES = 2**20  # smaller tensors are malloc's
RETURN_EVERY_BYTES = 16 * 2**20


def empty_mapped(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns an uninitialized contiguous CPU tensor."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < MIN_BYTES:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class ResidentMemory:
    """The memory that this process takes. Without a free descriptor to ask for it, it is what it was: a status must not
    fail for it."""

    def __init__(self) -> None:
        self._last_bytes = 0

    def size_bytes(self) -> int:
        """Returns the resident bytes; 0 if they were never known."""
        with suppress(OSError):
            self._last_bytes = int(psutil.Process().memory_info().rss)
        return self._last_bytes


def return_freed_memory() -> None:
    """Returns freed memory to the system if the C library can (glibc). It would otherwise keep the holes between
    experts: for experts of tens of megabytes, half as much again as the experts take."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
