"""Runs cycles.py in a namespace of its own, and reads what it found."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.hosts.namespace import Namespace, lacking

ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.support.autoscaling.cycles"
START_S, CYCLE_S = 120.0, 240.0  # at most


def why_not() -> str:
    """Returns why no namespace can be made here; empty if one can."""
    what = lacking()
    return f"autoscaling needs {what}" if what else ""


def run_cycles(folder: Path, kinds: Sequence[str]) -> dict[str, Any]:
    """Returns what cycles.py wrote. Raises AssertionError with its output if it failed."""
    environment = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    with Namespace("autoscaled", folder / "home", environment=environment) as namespace:
        path = f"{Path(sys.prefix) / 'bin'}:{namespace.environment['PATH']}"  # of `ray`
        namespace.run(
            *(sys.executable, "-m", MODULE, str(folder), *kinds), timeout_s=START_S + CYCLE_S * len(kinds), PATH=path
        )
        found: dict[str, Any] = json.loads((folder / "cycles.json").read_text())
    return found
