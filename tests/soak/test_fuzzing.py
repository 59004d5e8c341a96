"""Coverage-guided fuzzing of every decoder, reader, body and gRPC method, MOECLUSTER_SOAK_DURATION_S over all of them.

A finding is named in hexadecimal digits: repeat it with tests.support.fuzz.run.repeat.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clusters.every_method import OURS, methods_of
from tests.unit.fuzz.test_decoders_and_files import DECODERS, FILES

ROOT = Path(__file__).resolve().parents[2]
DURATION_S = float(os.environ.get("MOECLUSTER_SOAK_DURATION_S", "600"))
METHODS = tuple(method.path.removeprefix("/moecluster.v1.") for method in methods_of(*OURS))
TARGETS = (*DECODERS, *FILES, *METHODS)
START_S = 600.0  # of a process, on a busy machine


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_does_what_none_may_do(target: str) -> None:
    pytest.importorskip("atheris", reason="pip install 'moecluster[fuzz]'")
    seconds = max(int(DURATION_S / len(TARGETS)), 5)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fuzz.guided", target, str(seconds)],
        cwd=ROOT, capture_output=True, text=True, timeout=START_S + 10 * seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    assert runs is not None, done.stderr[-2000:]
    print(f"{target}: {runs[1]} inputs in {seconds} s")
