"""Giving memory back to the system that reading, packing and unloading experts have freed."""

import ctypes

RETURN_EVERY_BYTES = 16 * 2**20


def return_freed_memory() -> None:
    """Where the C library can (glibc). By itself it keeps holes between experts: half as much again as the experts,
    when they have tens of megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
