"""Compares one MoE layer (width 1024, inner 3584, 8 experts, top-2) side by side: moecluster ("ours") over gRPC,
transformers in process, plain Ray actors, and hivemind's mixture layer, all on the same two cores.

    python -m benchmarks.layer [--quick] [--without hivemind]

The in-process baseline is, for each case, the fastest combination of transformers' experts implementations and two wait
policies for idle threads. It is chosen first, then measured again in turns with ours. `--quick` runs only the cases
with a target.
"""

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from benchmarks.case import Case, Direction, DType, Transport
from benchmarks.measure import Contender, ContenderFailed, Turn, Worker, running, speed_ratios, take_turns
from benchmarks.peers import HIVEMIND_VERSION, PeerUnavailable, hivemind_python
from benchmarks.report import MIN_RUNS, Report, Row, installed_versions

NUM_CORES = 2
TOKENS = (1, 16, 256, 2048)
DTYPES: tuple[DType, ...] = ("bfloat16", "float32")
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")
TRANSPORTS: tuple[Transport, ...] = ("shm", "inline")
PLAIN_RAY_TOKENS = (256, 2048)
HIVEMIND_TOKENS = 64
MOST_TOKENS_BATCHED = 1  # batched_mm copies weights for every (token, expert) pair: already 40 times slower at 16
CHOOSING_RUNS = 5

# Minimum speed of ours, as a multiple of the in-process baseline's.
IN_PROCESS_TARGETS = {
    Case(tokens=2048, dtype="bfloat16", transport="shm"): 0.95,
    Case(tokens=256, dtype="bfloat16", transport="shm"): 0.90,
    Case(tokens=16, dtype="bfloat16", transport="shm"): 0.80,
    Case(tokens=1, dtype="bfloat16", transport="shm"): 0.60,
    Case(tokens=2048, dtype="bfloat16", transport="inline"): 0.85,
    Case(tokens=2048, dtype="bfloat16", transport="shm", direction="forward+backward"): 0.85,
}
PLAIN_RAY_TARGET = 2.0
HIVEMIND_TARGET = 20.0

RAY_ENV = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
OURS_MODULE = "benchmarks.workers.ours"
OURS = Contender(name="ours", module=OURS_MODULE, env=RAY_ENV)
OURS_INVARIANT = Contender(name="ours, batch-invariant", module=OURS_MODULE, args=("batch-invariant",), env=RAY_ENV)
PLAIN_RAY = Contender(
    name="plain Ray actors",
    module="benchmarks.workers.plain_ray",
    env=RAY_ENV,
)
THREADS_SPIN = {"OMP_NUM_THREADS": str(NUM_CORES)}
THREADS_SLEEP = {**THREADS_SPIN, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
IN_PROCESS = tuple(
    Contender(
        name=f"transformers {implementation}, idle threads {waiting}",
        module="benchmarks.workers.transformers_layer",
        args=(implementation,),
        env=env,
    )
    for implementation in ("eager", "grouped_mm", "batched_mm")
    for waiting, env in (("spin", THREADS_SPIN), ("sleep", THREADS_SLEEP))
)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Which cases are measured, and for how many seconds per run."""

    dtypes: Sequence[DType]
    min_run_s: float
    only_with_target: bool

    def cases(self) -> list[Case]:
        """Returns the cases without transport, dtype by dtype (weights are built per dtype), largest last."""
        every = [
            Case(tokens=tokens, dtype=dtype, direction=direction)
            for dtype in self.dtypes
            for direction in DIRECTIONS
            for tokens in TOKENS
        ]
        wanted = {replace(case, transport=None) for case in IN_PROCESS_TARGETS}
        return [case for case in every if case in wanted or not self.only_with_target]


FULL = Effort(dtypes=DTYPES, min_run_s=0.3, only_with_target=False)
QUICK = Effort(dtypes=("bfloat16",), min_run_s=0.1, only_with_target=True)


class Bench:
    """Collects report rows and the raw measurements behind them."""

    def __init__(self, *, effort: Effort, console: Console) -> None:
        self.effort = effort
        self.console = console
        self.rows: list[Row] = []
        self.calls: list[dict[str, Any]] = []  # every run of every contender, in the order measured

    def measure(self, turns: Mapping[str, Turn], *, runs: int = MIN_RUNS) -> dict[str, list[float]]:
        """Returns seconds per call of each contender, measured in turns. Also keeps them for the report's raw data."""
        seconds = take_turns(turns, runs=runs, min_run_s=self.effort.min_run_s)
        for name, turn in turns.items():
            contender = turn.worker.contender.name
            self.calls.append({"contender": contender, "case": str(turn.case), "seconds_per_call": seconds[name]})
        return seconds

    def add_time(self, contender: str, case: Case, seconds: Sequence[float]) -> None:
        name = f"{contender}: {case}"
        self.rows.append(Row(name=name, runs=[1e3 * s for s in seconds], unit="ms", better="lower"))

    def add_ratio(self, name: str, ratios: Sequence[float], target: float | None) -> None:
        self.rows.append(Row(name=name, runs=ratios, unit="x", target=target))

    def compare(
        self, label: str, other: Worker, case: Case, ours: Worker, targets: Mapping[Transport, float | None]
    ) -> None:
        """Adds rows for the other's time, for ours over each transport in `targets`, and for their speed ratio."""
        turns = {label: Turn(worker=other, case=case)}
        turns |= {transport: Turn(worker=ours, case=replace(case, transport=transport)) for transport in targets}
        seconds = self.measure(turns)
        self.add_time(label, case, seconds[label])
        for transport, target in targets.items():
            our_case = replace(case, transport=transport)
            self.add_time("ours", our_case, seconds[transport])
            ratios = speed_ratios(seconds[transport], seconds[label])
            self.add_ratio(f"speed of ours / {label}: {our_case}", ratios, target)


def choose_in_process(bench: Bench) -> dict[Case, Contender]:
    """Returns the fastest in-process setting for each case."""
    medians: dict[Case, dict[str, float]] = {case: {} for case in bench.effort.cases()}
    for contender in IN_PROCESS:
        with running(contender) as worker:
            for case, found in medians.items():
                if "batched_mm" not in contender.args or case.tokens <= MOST_TOKENS_BATCHED:
                    seconds = bench.measure({"it": Turn(worker=worker, case=case)}, runs=CHOOSING_RUNS)
                    found[contender.name] = statistics.median(seconds["it"])
    by_name = {contender.name: contender for contender in IN_PROCESS}
    return {case: by_name[min(found, key=lambda name: found[name])] for case, found in medians.items()}


def compare_in_process(bench: Bench) -> None:
    chosen = choose_in_process(bench)
    with running(OURS) as ours, ExitStack() as stack:
        winners = dict.fromkeys(chosen.values())
        workers = {contender: stack.enter_context(running(contender)) for contender in winners}
        for case, contender in chosen.items():
            targets = {t: IN_PROCESS_TARGETS.get(replace(case, transport=t)) for t in TRANSPORTS}
            bench.console.print(f"in process, {case}: {contender.name}")
            bench.compare("in process", workers[contender], case, ours, targets)


def compare_plain_ray(bench: Bench) -> None:
    with running(OURS) as ours, running(PLAIN_RAY) as plain_ray:
        for tokens in PLAIN_RAY_TOKENS:
            case = Case(tokens=tokens, dtype="bfloat16")
            bench.compare("plain Ray", plain_ray, case, ours, {"shm": PLAIN_RAY_TARGET})


def compare_hivemind(bench: Bench) -> None:
    case = Case(tokens=HIVEMIND_TOKENS, dtype="bfloat16")
    contender = Contender(
        name="hivemind mixture",
        module="benchmarks.workers.hivemind_layer",
        args=(case.dtype,),
        python=hivemind_python(),
    )
    with running(OURS) as ours, running(contender) as hivemind:
        bench.compare("hivemind", hivemind, case, ours, {"shm": HIVEMIND_TARGET})


def price_batch_invariance(bench: Bench) -> None:
    """Measures how many times as long a call takes in batch-invariant mode."""
    with running(OURS) as plain, running(OURS_INVARIANT) as invariant:
        for tokens in TOKENS:
            case = Case(tokens=tokens, dtype="bfloat16", transport="shm")
            seconds = bench.measure(
                {"plain": Turn(worker=plain, case=case), "invariant": Turn(worker=invariant, case=case)}
            )
            price = speed_ratios(seconds["plain"], seconds["invariant"])
            name = f"time of batch-invariant / plain mode: {case}"
            bench.rows.append(Row(name=name, runs=price, unit="x", better="lower"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the cases with a target, shorter runs")
    parser.add_argument("--without", choices=["hivemind"], help="leave this contender out (it needs an install)")
    options = parser.parse_args()

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])  # every contender inherits it
    console = Console()
    bench = Bench(effort=QUICK if options.quick else FULL, console=console)

    parts = [compare_in_process, compare_plain_ray]
    parts += [compare_hivemind] if options.without != "hivemind" else []
    parts += [price_batch_invariance]
    for part in parts:
        try:
            part(bench)
        except (ContenderFailed, PeerUnavailable) as exc:
            console.print(f"[red]left out:[/] {exc}")

    versions = installed_versions() | ({"hivemind": HIVEMIND_VERSION} if compare_hivemind in parts else {})
    report = Report(name="layer", rows=bench.rows, raw=bench.calls, versions=versions)
    report.print(console)
    console.print(f"written: {report.write().name}")


if __name__ == "__main__":
    main()
