"""The loop of a contender's process: one JSON line with a case comes in, one with seconds per call goes out."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from benchmarks.case import Case

Call = Callable[[], None]
MakeCall = Callable[[Case], Call]

WARM_UP_S = 0.1  # other contenders ran in between, so caches and clocks are cold at each order
KEPT_CALLS = 2  # a contender is asked for two transports of one case in turn


def serve(make_call: MakeCall) -> None:
    """Measure what standard input orders until it orders to stop, or ends.

    In:  {"tokens", "dtype", "direction", "transport", "runs", "min_run_s"} or {"stop": true}.
    Out: {"seconds_per_call": [one figure a run]} or {"error": "..."}.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not look like an answer
    prepare = lru_cache(maxsize=KEPT_CALLS)(lambda case: _first_called(make_call(case)))
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("stop"):
            return
        answers.write(json.dumps(_answer(prepare, order)) + "\n")


def _first_called(call: Call) -> Call:
    call()
    return call


def _answer(prepare: MakeCall, order: dict[str, Any]) -> dict[str, Any]:
    runs, min_run_s = order.pop("runs"), order.pop("min_run_s")
    try:
        return {"seconds_per_call": time_runs(prepare(Case(**order)), runs=runs, min_run_s=min_run_s)}
    except Exception as exc:  # the harness tells the user, and asks for the next case
        return {"error": f"{type(exc).__name__}: {exc}"}


def time_runs(call: Call, *, runs: int, min_run_s: float) -> list[float]:
    """Seconds per call of `runs` runs, each of as many calls as fill `min_run_s`, after a warm-up."""
    repeats = max(1, math.ceil(min_run_s / _warm_up(call)))
    return [_time_calls(call, repeats) / repeats for _ in range(runs)]


def _warm_up(call: Call) -> float:
    """Calls for WARM_UP_S, at least once; returns the seconds of the last call."""
    end_s = time.perf_counter() + WARM_UP_S
    while True:
        last_s = _time_calls(call, 1)
        if time.perf_counter() >= end_s:
            return last_s


def _time_calls(call: Call, repeats: int) -> float:
    start_s = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start_s
