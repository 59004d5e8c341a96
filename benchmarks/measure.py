"""Measures contenders side by side: each in a process of its own, one at a time, in turns.

A contender is a module that calls `benchmarks.workers.loop.serve`. Its process blocks on standard input while another
is measured, so each contender has its own threads and environment, and no two compute at the same time.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.case import Case

ROOT = Path(__file__).parent.parent
CALL_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
SETTLE_S = 0.05  # lets a contender's threads stop spinning before the next one is measured


class ContenderFailed(Exception):
    """A contender's process ended, or it cannot measure a case."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """How to start a contender: `python -m module *args` in the project's root, with `env` added."""

    name: str
    module: str
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    python: Path = Path(sys.executable)


class Worker:
    """A contender's running process."""

    def __init__(self, contender: Contender, process: subprocess.Popen[str], stderr_path: Path) -> None:
        self.contender = contender
        self._process = process
        self._stderr_path = stderr_path

    def measure(self, case: Case, *, runs: int = 1, min_run_s: float) -> list[float]:
        """Returns seconds per call, one value per run. Raises ContenderFailed."""
        answer = self._ask({**case.to_json(), "runs": runs, "min_run_s": min_run_s})
        if "error" in answer:
            raise ContenderFailed(f"{self.contender.name} ({case}): {answer['error']}")
        return [float(seconds) for seconds in answer["seconds_per_call"]]

    def _ask(self, order: Mapping[str, object]) -> dict[str, list[float]]:
        assert self._process.stdin and self._process.stdout
        deadline = threading.Timer(CALL_TIMEOUT_S, self._process.kill)
        deadline.start()
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            deadline.cancel()
        if not line:
            raise ContenderFailed(f"{self.contender.name} ended: {self._last_words()}")
        answer: dict[str, list[float]] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        lines = self._stderr_path.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"no word, exit status {self._process.poll()}"


@contextlib.contextmanager
def running(contender: Contender) -> Iterator[Worker]:
    """Starts a contender. On exit, ends it and kills what is left of its process group."""
    with tempfile.TemporaryDirectory() as folder:
        stderr_path = Path(folder) / "stderr"
        with stderr_path.open("w") as stderr:
            process = subprocess.Popen(
                [str(contender.python), "-m", contender.module, *contender.args],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **contender.env},
                start_new_session=True,
            )
        try:
            yield Worker(contender, process, stderr_path)
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps({"stop": True}) + "\n")
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):  # nothing of its group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A contender in a comparison, with the case it measures."""

    worker: Worker
    case: Case


def take_turns(turns: Mapping[str, Turn], *, runs: int, min_run_s: float) -> dict[str, list[float]]:
    """Returns seconds per call of each, measured A B A B ..., so that the i-th values of all are adjacent in time."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(runs):
        for name, turn in turns.items():
            seconds[name] += turn.worker.measure(turn.case, min_run_s=min_run_s)
            time.sleep(SETTLE_S)
    return seconds


def speed_ratios(seconds: Sequence[float], baseline_seconds: Sequence[float]) -> list[float]:
    """Returns the speedup over the baseline, run by run. The i-th runs were adjacent in time, so slow drift cancels."""
    return [baseline / own for own, baseline in zip(seconds, baseline_seconds, strict=True)]
