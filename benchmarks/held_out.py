"""Tests the planner on loads it was not tuned on: other laws, exponents and seeds than those of `benchmarks.planner`.

    python -m benchmarks.held_out [--quick]

Seven scenarios with 58 layers of 256 experts on 320 slots of 32 actors, 30 windows each, counted as routers would. All
policies start from the same cold plan; each decision knows the windows before the one it is scored on. `share` is
compared with `eplb`, and with `share` without its reaction to sudden shifts. `--quick` does two runs of each and writes
no report.

One exception: the number of moves that a shifted layer makes at once was tuned on the first run of the topic shifts.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.expert_loads import Floats
from benchmarks.planner import (
    FLEETS,
    FULL,
    INCREMENTAL_TARGET_MS,
    NUM_EXPERTS,
    NUM_EXPERTS_L,
    NUM_LAYERS,
    QUICK,
    ROOMY,
    WINDOW_S,
    Bench,
    Contender,
    mean_balancedness,
    stay_on_one_thread,
)
from benchmarks.report import Report, installed_versions
from moecluster.placement.plan.cold import cold_plan
from moecluster.placement.plan.incremental import MoveSettings
from moecluster.placement.policy.interface import Decision, Observation, Policy
from moecluster.placement.policy.registry import policy_named
from moecluster.placement.policy.share import SharePolicy, ShareSettings, ShareState
from moecluster.simulation.synthetic_load import LoadShape, SyntheticLoads

NUM_WINDOWS = 30
SHIFT_EVERY_WINDOWS = 11
FIRST_SEED = 1000
TOP_K = 8
TOKENS_PER_S = 2e5
HOUR_S = 3600.0

CALM = {"drift": 0.3, "drift_time_s": 4 * HOUR_S, "bursts_per_hour": 0.0, "swing": 0.0}
SCENARIOS: dict[str, dict[str, float]] = {
    "slow drift, s=0.7": {**CALM, "zipf": 0.7},
    "slow drift, s=1.3": {**CALM, "zipf": 1.3},
    "fast drift, s=0.9": {**CALM, "zipf": 0.9, "drift": 0.5, "drift_time_s": HOUR_S},
    "bursts, s=1.1": {**CALM, "zipf": 1.1, "bursts_per_hour": 12.0, "burst_factor": 6.0, "burst_s": 300.0},
    "daily swing, s=0.9": {**CALM, "zipf": 0.9, "swing": 0.6, "drift": 0.5},
    "topic shift in 30 % of the layers, s=0.9": {**CALM, "zipf": 0.9, "shift_part": 0.3},
    "topic shift in 30 % of the layers, s=1.1": {**CALM, "zipf": 1.1, "shift_part": 0.3},
}


@dataclass(frozen=True, kw_only=True)
class WithinBudget:
    """`share` without its reaction to sudden shifts: no extra moves at once, no decision beyond its own budget."""

    name: str = "share within each budget"
    policy: SharePolicy = field(
        default_factory=lambda: SharePolicy(settings=ShareSettings(moves=MoveSettings(shifted=np.inf)))
    )

    def first_state(self) -> ShareState:
        return self.policy.first_state()

    def decide(self, seen: Observation, state: ShareState) -> tuple[Decision, ShareState]:
        return self.policy.decide(replace(seen, burst=0.0), state)


def windows_of(scenario: str, run: int) -> Iterator[Floats]:
    """Yields the assignments [L, E] counted in each window of a scenario. Runs differ by their seeds."""
    changes = dict(SCENARIOS[scenario])
    if "shift_part" in changes:
        changes["shift_every_s"] = SHIFT_EVERY_WINDOWS * WINDOW_S
    shape = LoadShape(num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K, tokens_per_s=TOKENS_PER_S, **changes)
    seed = FIRST_SEED + 100 * list(SCENARIOS).index(scenario) + run
    for load in SyntheticLoads(shape, window_s=WINDOW_S, num_windows=NUM_WINDOWS, seed=seed):
        yield load.counts_LE.astype(np.float64)


def compare(bench: Bench, scenario: str) -> None:
    days = [run_through(bench, scenario, run) for run in bench.seeds()]
    before = WithinBudget().name
    mean = {name: [float(np.mean(day[name].scores)) for day in days] for name in days[0]}
    for name, scores in mean.items():
        bench.add(f"{scenario}: {name}", scores)
    bench.add(f"{scenario}: share - eplb", np.subtract(mean["share"], mean["eplb"]))
    bench.add(f"{scenario}: share - {before}", np.subtract(mean["share"], mean[before]))
    if "shift_part" in SCENARIOS[scenario]:
        for name in days[0]:
            after = [float(np.mean(day[name].scores[SHIFT_EVERY_WINDOWS - 1 :: SHIFT_EVERY_WINDOWS])) for day in days]
            bench.add(f"{scenario}: {name}, one decision after a shift", after)
    for name in (before, "share"):
        moved = [day[name].moved / day["eplb"].moved for day in days]
        bench.add(f"{scenario}: moved bytes, {name} / eplb", moved, better="lower")
        times = [float(np.median(day[name].times_ms)) for day in days]
        target = INCREMENTAL_TARGET_MS if name == "share" else None
        bench.add(f"{scenario}: decision, {name}", times, "ms", target, better="lower")
        slowest = [float(np.max(day[name].times_ms)) for day in days]
        bench.add(f"{scenario}: slowest decision, {name}", slowest, "ms", better="lower")


def run_through(bench: Bench, scenario: str, run: int) -> dict[str, Contender]:
    """Runs all policies through the same windows."""
    fleet = FLEETS[ROOMY]()
    windows = windows_of(scenario, run)
    previous_LE = next(windows)
    plan = cold_plan(previous_LE, NUM_EXPERTS_L, fleet)
    policies: list[Policy[Any]] = [policy_named("eplb"), WithinBudget(), policy_named("share")]
    contenders = {p.name: Contender(policy=p, layout=plan, state=p.first_state()) for p in policies}
    for window, load_LE in enumerate(windows, start=1):
        for contender in contenders.values():
            contender.decide(previous_LE, WINDOW_S * window, fleet)
            contender.scores.append(mean_balancedness(contender.layout, load_LE, fleet))
        previous_LE = load_LE
    for name, contender in contenders.items():
        scores = [round(score, 4) for score in contender.scores]
        bench.raw.append({"scenario": scenario, "run": run, "policy": name, "scores": scores, "moved": contender.moved})
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two runs of each")
    options = parser.parse_args()
    stay_on_one_thread("benchmarks.held_out")
    console = Console()
    bench = Bench(effort=QUICK if options.quick else FULL, console=console)
    for scenario in SCENARIOS:
        compare(bench, scenario)
        console.print(f"done: {scenario}")
    versions = installed_versions(("moecluster", "numpy"))
    report = Report(name="held_out", rows=bench.rows, raw=bench.raw, versions=versions)
    report.print(console)
    if not options.quick:
        console.print(f"written: {report.write().name}")


if __name__ == "__main__":
    main()
