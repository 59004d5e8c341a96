"""Twenty cycles of load, under which Ray's autoscaler brings a node and takes it: make soak DURATION=800, as root. A
shorter soak runs fewer; the figures of twenty are written to benchmarks/results."""

import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.report import MIN_RUNS, Report, Row, installed_versions
from tests.support.autoscaling.run_cycles import run_cycles, why_not

DURATION_S = float(os.environ.get("MOECLUSTER_SOAK_DURATION_S", "60"))
ALL = 20
CYCLE_S = 40.0  # about, the mean of PATTERN
PATTERN = ("idle", "idle", "drained", "idle", "terminated")  # how the node goes, over and over
# Caches fill in a long cycle, which is none of the twenty, and in the first WARM_UP of these. Then the medians of the
# next WINDOW cycles and of the last WINDOW are compared.
WARM_UP = WINDOW = 5
FLAT = 0.01  # of the earlier median
HELD = {
    "pss_bytes": "memory (PSS)",
    "own_bytes": "memory that is no file's",
    "descriptors": "descriptors",
    "shared_bytes": "shared memory (memfd)",
}

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "can")


def test_nodes_come_and_go_without_a_failed_request_and_no_process_grows(tmp_path: Path) -> None:
    number = max(min(int(DURATION_S / CYCLE_S), ALL), 2)
    found = run_cycles(tmp_path, ["long", *(PATTERN[i % len(PATTERN)] for i in range(number))])
    del found["cycles"][0]
    growth = growths(found["cycles"]) if number == ALL else {}
    result = report(found, growth)
    result.print(Console())
    assert not any(cycle["late"] for cycle in found["cycles"])
    if number == ALL:
        print(f"written to {result.write()}")
        assert all(grown <= FLAT for grown in growth.values()), growth


def growths(cycles: list[dict[str, Any]]) -> dict[str, float]:
    """Returns by which part the median of the last cycles is above that of the first settled ones: for each process
    that outlives all cycles and each thing that it holds, as process/thing, and for /dev/shm."""
    first, last = cycles[WARM_UP : WARM_UP + WINDOW], cycles[-WINDOW:]
    grown = {"/dev/shm": _growth([cycle["shared_folder_bytes"] for cycle in part] for part in (first, last))}
    for process, held in cycles[0]["held"].items():
        for what in held:
            grown[f"{process}/{what}"] = _growth(
                [cycle["held"][process][what] for cycle in part] for part in (first, last)
            )
    return grown


def _growth(values: Any) -> float:
    before, after = map(statistics.median, values)
    return (after - before) / before if before else float(after > 0)


def report(found: dict[str, Any], growth: dict[str, float]) -> Report:
    cycles = found["cycles"]

    def once(name: str, value: float, unit: str, target: float | None = None) -> Row:
        return Row(name=name, runs=[value] * MIN_RUNS, unit=unit, target=target, better="lower")

    rows = [
        once("cycles", len(cycles), ""),
        once("requests", found["texts"], ""),
        once("requests that failed", 0.0, "", 0.0),  # cycles.py ends with an error otherwise
        once("texts that were wrong", 0.0, "", 0.0),
        once("experts lost with a node", float(sum(len(cycle["late"]) for cycle in cycles)), "", 0.0),
        Row(name="load up until the node serves", runs=[c["large_s"] for c in cycles], unit="s", better="lower"),
        Row(name="cycle", runs=[c["small_s"] for c in cycles], unit="s", better="lower"),
    ]
    for what, unit in HELD.items():
        of_kind = [grown for name, grown in growth.items() if name.endswith(f"/{what}")]
        if of_kind:
            rows.append(once(f"{unit}: growth of the process that grew most", max(of_kind) * 100, "%", FLAT * 100))
    if growth:
        rows.append(once("/dev/shm: growth", growth["/dev/shm"] * 100, "%", FLAT * 100))
    return Report(
        name="autoscaling_soak", rows=rows, raw={"cycles": cycles, "growth": growth}, versions=installed_versions()
    )
