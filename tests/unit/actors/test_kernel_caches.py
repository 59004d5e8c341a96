"""The cache of kernels compiled per number of rows stays bounded in an actor's environment."""

import os
import subprocess
import sys

import pytest

from actors.names import process_environment

BOUND_BYTES = 64 * 10**6

# malloc's bytes in use: resident memory would include freed memory.
PROGRAM = """
import ctypes
import torch
from moecluster.moe.linear import pack, linear

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo
weight_OI, x_TI = pack(torch.randn(64, 32)), torch.randn(400, 32)
with torch.inference_mode():
    linear(x_TI, weight_OI, None)
    before = mallinfo().uordblks
    for rows in range(1, 400):
        linear(x_TI[:rows], weight_OI, None)
print(mallinfo().uordblks - before)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallinfo2 counts")


def growth_bytes(environment: dict[str, str]) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=100.0,
        check=True,
    )
    return int(done.stdout)


def test_kernels_for_many_numbers_of_rows_are_not_all_kept() -> None:
    bounded_bytes = growth_bytes(process_environment(1))
    assert bounded_bytes < BOUND_BYTES
    assert bounded_bytes < growth_bytes({}) / 2  # else this machine caches none, and the test proves nothing
