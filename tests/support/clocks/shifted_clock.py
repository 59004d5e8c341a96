"""A wall clock that can be set, for one process: never the machine's."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("shifted_clock.c")
VARIABLE = "SHIFTED_CLOCK"
OFFSET = struct.Struct("q")


def shifted_environment(folder: Path) -> dict[str, str]:
    """Returns the environment variables of a process that can `set_clock`. folder: gets the library that is preloaded.
    Skips the test where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library, offset = folder / "shifted_clock.so", folder / "offset"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    offset.write_bytes(OFFSET.pack(0))
    return {"LD_PRELOAD": str(library), VARIABLE: str(offset)}


def set_clock(offset_s: int) -> None:
    """Sets this process' wall clock to offset_s after the machine's."""
    with Path(os.environ[VARIABLE]).open("r+b", buffering=0) as file:  # never truncated: it is mapped
        file.write(OFFSET.pack(offset_s))
