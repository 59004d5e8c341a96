"""A really full disk, as a small file system in a mount namespace of its own: whoever writes says so in one line and
leaves nothing torn under its final name and what was there before whole, and can go on once there is room."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.exhaustion.full_disk import CASES
from tests.support.in_child import ROOT, TIMEOUT_S, mounted


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_costs_nothing_that_was_written_before(case: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *mounted("size=1m,nr_inodes=64", tmp_path),
            *(sys.executable, "-m", "tests.support.exhaustion.full_disk", case, str(tmp_path)),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
