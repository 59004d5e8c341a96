"""The report of a benchmark: rows with their targets, printed as a table and written to `results/NAME.json`."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("moecluster", "torch", "transformers", "ray", "grpcio", "protobuf", "numpy")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
MIN_RUNS = 5  # fewer give no meaningful spread


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric: `runs` has one value per run, and the row's value is their median. `target` None: not judged."""

    name: str
    runs: Sequence[float]
    unit: str
    target: float | None = None
    better: Literal["higher", "lower"] = "higher"

    @property
    def value(self) -> float:
        return statistics.median(self.runs)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": _rounded(self.value),
            "unit": self.unit,
            "target": self.target,
            "better": self.better,
            "met": self.met,
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of one script. `raw` is the data that lets a reader check the rows."""

    name: str
    rows: Sequence[Row]
    raw: Any
    versions: dict[str, str]

    def write(self, folder: Path = RESULTS) -> Path:
        """Writes `folder/NAME.json`. Its `raw` has the spread of every row and the script's own raw data."""
        path = folder / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        return path

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "versions": self.versions,
            "rows": [row.to_json() for row in self.rows],
            "raw": {"spread": {row.name: spread(row.runs) for row in self.rows}, "measured": self.raw},
        }

    def print(self, console: Console) -> None:
        table = Table("", "median", "unit", "min to max", "target", "met", title=self.name)
        for column in (1, 3, 4):
            table.columns[column].justify = "right"
        for row in self.rows:
            sign = ">=" if row.better == "higher" else "<="
            target = "" if row.target is None else f"{sign} {row.target:g}"
            met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.met]
            between = f"{min(row.runs):.3g} to {max(row.runs):.3g}"
            table.add_row(row.name, f"{row.value:.3g}", row.unit, between, target, met)
        console.print(table)


def spread(runs: Sequence[float]) -> dict[str, float]:
    return {"min": _rounded(min(runs)), "median": _rounded(statistics.median(runs)), "max": _rounded(max(runs))}


def installed_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Returns the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_machine() -> dict[str, Any]:
    """Returns CPU model and instruction sets, cores usable by this process, memory and operating system, but nothing
    that names the host."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _of_cpu("model name") or platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in _of_cpu("flags").split()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "system": platform.system(),
    }


def _of_cpu(field: str) -> str:
    """Returns a field of the first CPU; empty where the kernel does not tell."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(field):
            return line.split(":", 1)[1].strip()
    return ""


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
