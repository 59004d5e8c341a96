"""Whatever bytes arrive, decoders and readers answer with one of our errors, in bounded time and memory.

Inputs are the same in every run. `make soak` searches further, guided by coverage (tests/soak/test_fuzzing.py).
"""

from pathlib import Path

import pytest

from tests.support.fuzz.decoders import decoders
from tests.support.fuzz.files import files
from tests.support.fuzz.run import run_many

with decoders() as targets:
    DECODERS = tuple(targets)
with files(Path()) as targets:
    FILES = tuple(targets)
MESSAGES, TEXTS = 3000, 1500


@pytest.mark.parametrize("name", DECODERS)
def test_messages(name: str) -> None:
    with decoders() as targets:
        run_many(targets[name], MESSAGES)


@pytest.mark.parametrize("name", FILES)
def test_files_and_bodies(name: str, tmp_path: Path) -> None:
    with files(tmp_path) as targets:
        run_many(targets[name], TEXTS)
