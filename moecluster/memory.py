"""Memory for weights: a mapping for each, which comes in huge pages and goes back to the system with its last user.

malloc keeps an arena for each thread that reads experts, and holes in it between experts that were unloaded: what
reading, packing and unloading have freed is given back. And half the time of reading from the page cache into fresh
memory is the kernel handing out pages of 4 KB.
"""

import ctypes
import math
import mmap

import torch

MIN_BYTES = 2**20  # smaller tensors are malloc's
RETURN_EVERY_BYTES = 16 * 2**20


def empty_mapped(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous CPU tensor."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < MIN_BYTES:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def return_freed_memory() -> None:
    """Where the C library can (glibc). By itself it keeps holes between experts: half as much again as the experts,
    when they have tens of megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
