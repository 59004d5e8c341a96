"""Compares the planner with EPLB and with a static placement: 58 layers of 256 experts, Zipf loads.

    python -m benchmarks.planner [--quick]

Cold plans against the upper bound; shares alone after a 5 % drift; 200 windows of a day with drift, bursts and a swing
(each decision knows the windows before the one it is scored on); an actor that drops to half its speed; and the time
that decisions take, on one thread. `--quick` does two runs of everything and the first 40 windows.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console
from scipy.optimize import linear_sum_assignment

from benchmarks.expert_loads import Floats, day_of_windows, drifted, zipf_loads
from benchmarks.report import MIN_RUNS, Report, Row, installed_versions
from moecluster.placement.layout import Fleet, Layout, added_R, with_shares
from moecluster.placement.load.forecast import Trend, forecast
from moecluster.placement.names import balancedness_L
from moecluster.placement.plan.cold import cold_plan
from moecluster.placement.plan.replica_counts import least_worst_load_L
from moecluster.placement.plan.shares import least_max_shares
from moecluster.placement.policy.eplb import eplb_plan
from moecluster.placement.policy.interface import USUAL_BURST, Decision, Observation, Policy, decision_of
from moecluster.placement.policy.registry import policy_named

NUM_LAYERS, NUM_EXPERTS = 58, 256
NUM_EXPERTS_L = np.full(NUM_LAYERS, NUM_EXPERTS)
EXPERT_BYTES = 3 * 7168 * 2048.0  # DeepSeek-V3 in FP8
ACTORS_A_NODE = 8
EXPONENTS = (0.8, 1.0, 1.2)
DRIFT = 0.05
WINDOW_S, WINDOWS_A_DAY = 60.0, 200
BUDGET_BYTES = 400 * EXPERT_BYTES  # per decision

BOUND_TARGET = 0.995
DRIFT_TARGET = 0.995
MOVED_TARGET = 0.03
RESHARE_TARGET_MS, INCREMENTAL_TARGET_MS = 15.0, 50.0
STRAGGLER_TARGET = 0.98

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def equal_fleet(num_replicas: int, num_actors: int) -> Fleet:
    return make_fleet(np.full(num_actors, num_replicas // num_actors), np.ones(num_actors))


def uneven_fleet() -> Fleet:
    """37 actors of speeds 1, 2 and 4, with 8 or 9 slots each: 331 in all."""
    rng = np.random.default_rng(37)
    slots_A = np.full(37, 8)
    slots_A[: 331 - slots_A.sum()] += 1
    return make_fleet(rng.permutation(slots_A), rng.permutation(np.repeat([1.0, 2.0, 4.0], [13, 12, 12])))


def make_fleet(slots_A: np.ndarray, speed_A: Floats) -> Fleet:
    return Fleet(
        slots_A=slots_A,
        speed_A=speed_A,
        node_A=np.arange(len(slots_A)) // ACTORS_A_NODE,
        expert_bytes_L=np.full(NUM_LAYERS, EXPERT_BYTES),
    )


FLEETS: dict[str, Callable[[], Fleet]] = {
    "288 on 32": lambda: equal_fleet(288, 32),
    "320 on 32": lambda: equal_fleet(320, 32),
    "320 on 40": lambda: equal_fleet(320, 40),
    "320 on 64": lambda: equal_fleet(320, 64),
    "331 on 37 uneven": uneven_fleet,
}
ROOMY = "320 on 32"  # the fleet of the drift, day and straggler benchmarks


@dataclass(frozen=True, kw_only=True)
class Effort:
    runs: int
    windows: int


FULL = Effort(runs=MIN_RUNS, windows=WINDOWS_A_DAY)
QUICK = Effort(runs=2, windows=40)


@dataclass(kw_only=True)
class Bench:
    """Collects report rows and the raw data behind them."""

    effort: Effort
    console: Console
    rows: list[Row] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, runs: Iterable[float], unit: str = "", target: float | None = None, **better: Any) -> None:
        self.rows.append(Row(name=name, runs=[float(run) for run in runs], unit=unit, target=target, **better))

    def seeds(self) -> range:
        return range(self.effort.runs)


def mean_balancedness(layout: Layout, load_LE: Floats, fleet: Fleet) -> float:
    return float(balancedness_L(layout, load_LE, fleet).mean())


def compare_cold_plans(bench: Bench) -> None:
    for name, make in FLEETS.items():
        fleet = make()
        for exponent in EXPONENTS:
            bounds, ours, theirs, times = [], [], [], []
            for seed in bench.seeds():
                load_LE = zipf_loads(np.random.default_rng(seed), NUM_LAYERS, NUM_EXPERTS, exponent)
                ideal_L = load_LE.sum(axis=1) / fleet.speed_A.sum()
                bounds.append(float((ideal_L / least_worst_load_L(load_LE, NUM_EXPERTS_L, fleet)).mean()))
                start_s = time.perf_counter()
                plan = cold_plan(load_LE, NUM_EXPERTS_L, fleet)
                times.append(1e3 * (time.perf_counter() - start_s))
                ours.append(mean_balancedness(plan, load_LE, fleet))
                theirs.append(mean_balancedness(eplb_plan(load_LE, NUM_EXPERTS_L, fleet), load_LE, fleet))
            case = f"cold plan, {name}, s={exponent}"
            bench.add(f"{case}: upper bound", bounds)
            bench.add(f"{case}: eplb", theirs)
            bench.add(f"{case}: share", ours)
            bench.add(f"{case}: share - eplb", np.subtract(ours, theirs), target=0.0)
            bench.add(f"{case}: share / upper bound", np.divide(ours, bounds), target=BOUND_TARGET)
            bench.add(f"{case}: time", times, "ms", better="lower")


def compare_after_drift(bench: Bench) -> None:
    """Compares re-sharing alone, which moves no replica, with EPLB's stale plan."""
    for name, make in FLEETS.items():
        fleet = make()
        for exponent in EXPONENTS:
            ours, stale, times = [], [], []
            for seed in bench.seeds():
                rng = np.random.default_rng(seed)
                load_LE = zipf_loads(rng, NUM_LAYERS, NUM_EXPERTS, exponent)
                plan = cold_plan(load_LE, NUM_EXPERTS_L, fleet)
                moved_LE = drifted(rng, load_LE, DRIFT)
                start_s = time.perf_counter()
                shared = with_shares(plan, least_max_shares(plan, moved_LE, fleet).share_R)
                times.append(1e3 * (time.perf_counter() - start_s))
                ours.append(mean_balancedness(shared, moved_LE, fleet))
                stale.append(mean_balancedness(eplb_plan(load_LE, NUM_EXPERTS_L, fleet), moved_LE, fleet))
            case = f"after 5 % drift, {name}, s={exponent}"
            bench.add(f"{case}: eplb's stale plan", stale)
            bench.add(f"{case}: shares alone", ours, target=DRIFT_TARGET if name == ROOMY else None)
            bench.add(f"{case}: re-share", times, "ms", target=RESHARE_TARGET_MS, better="lower")


@dataclass(frozen=True, kw_only=True)
class ForecastEplb:
    """EPLB on the same forecast that `share` uses. Shows how much of the lead over `eplb` is due to the forecast."""

    name: str = "eplb with the same forecast"

    def first_state(self) -> Trend | None:
        return None

    def decide(self, seen: Observation, state: Trend | None) -> tuple[Decision, Trend | None]:
        load_LE, trend = forecast(seen.load_LE, state)
        plan = eplb_plan(load_LE, seen.layout.num_experts_L, seen.fleet)
        return decision_of(seen, plan, "EPLB's plan for the load to come"), trend


@dataclass(kw_only=True)
class Contender:
    """A policy's run through a day, with its scores."""

    policy: Policy[Any]
    layout: Layout
    state: Any
    scores: list[float] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    moved: int = 0
    moved_relabelled: int = 0  # if each new plan's actors were renamed so that the fewest replicas move

    def decide(self, load_LE: Floats, now_s: float, fleet: Fleet) -> None:
        seen = Observation(
            now_s=now_s,
            load_LE=load_LE,
            fleet=fleet,
            layout=self.layout,
            budget_bytes=BUDGET_BYTES,
            burst=USUAL_BURST,
        )
        start_s = time.perf_counter()
        decision, self.state = self.policy.decide(seen, self.state)
        self.times_ms.append(1e3 * (time.perf_counter() - start_s))
        self.moved += int(added_R(self.layout, decision.layout).sum())
        self.moved_relabelled += fewest_moves(self.layout, decision.layout, fleet)
        self.layout = decision.layout


def fewest_moves(before: Layout, after: Layout, fleet: Fleet) -> int:
    """Returns the replicas that must be loaded if the actors of `after`, which are identical, may be renamed, layer by
    layer."""
    shape = (NUM_LAYERS, fleet.num_actors, NUM_EXPERTS)
    held = []
    for layout in (before, after):
        holds_LAE = np.zeros(shape, dtype=np.float32)
        holds_LAE[layout.layer_R, layout.actor_R, layout.expert_R] = 1
        held.append(holds_LAE)
    kept = 0.0
    for before_AE, after_AE in zip(*held, strict=True):
        common_AA = before_AE @ after_AE.T
        kept += common_AA[linear_sum_assignment(common_AA, maximize=True)].sum()
    return after.num_replicas - int(kept)


def compare_through_a_day(bench: Bench) -> None:
    fleet = FLEETS[ROOMY]()
    for exponent in EXPONENTS:
        days = [run_day(bench, fleet, exponent, seed) for seed in bench.seeds()]
        case = f"{bench.effort.windows} windows, {ROOMY}, s={exponent}"
        mean = {name: [float(np.mean(day[name].scores)) for day in days] for name in days[0]}
        for name, scores in mean.items():
            bench.add(f"{case}: {name}", scores)
        bench.add(f"{case}: share - eplb", np.subtract(mean["share"], mean["eplb"]), target=0.0)
        foreseeing = mean[ForecastEplb().name]
        bench.add(f"{case}: share - eplb with the same forecast", np.subtract(mean["share"], foreseeing))
        own = [day["share"].moved for day in days]
        bench.add(f"{case}: replicas moved, share", own, better="lower")
        theirs = [day["eplb"].moved for day in days]
        least = [day["eplb"].moved_relabelled for day in days]
        to_least = f"{case}: moved bytes, share / eplb with its actors named for fewest moves"
        bench.add(f"{case}: moved bytes, share / eplb", np.divide(own, theirs), target=MOVED_TARGET, better="lower")
        bench.add(to_least, np.divide(own, least), target=MOVED_TARGET, better="lower")
        times = [float(np.median(day["share"].times_ms)) for day in days]
        bench.add(f"{case}: incremental plan", times, "ms", target=INCREMENTAL_TARGET_MS, better="lower")
        slowest = [float(np.max(day["share"].times_ms)) for day in days]
        bench.add(f"{case}: slowest incremental plan", slowest, "ms", better="lower")


def run_day(bench: Bench, fleet: Fleet, exponent: float, seed: int) -> dict[str, Contender]:
    """Runs all policies through the same day, each from its own plan for the first window. static keeps EPLB's plan."""
    contenders: dict[str, Contender] = {}
    previous_LE: Floats | None = None
    windows = day_of_windows(np.random.default_rng(seed), NUM_LAYERS, NUM_EXPERTS, exponent, WINDOWS_A_DAY)
    for window, load_LE in enumerate(islice(windows, bench.effort.windows)):
        if previous_LE is None:
            theirs, ours = eplb_plan(load_LE, NUM_EXPERTS_L, fleet), cold_plan(load_LE, NUM_EXPERTS_L, fleet)
            starts: list[tuple[Policy[Any], Layout]] = [
                (policy_named("eplb"), theirs),
                (ForecastEplb(), theirs),
                (policy_named("share"), ours),
                (policy_named("static"), theirs),
            ]
            for policy, plan in starts:
                contenders[policy.name] = Contender(policy=policy, layout=plan, state=policy.first_state())
        else:
            for contender in contenders.values():
                contender.decide(previous_LE, WINDOW_S * window, fleet)
                contender.scores.append(mean_balancedness(contender.layout, load_LE, fleet))
        previous_LE = load_LE
    for name, contender in contenders.items():
        scores = [round(score, 4) for score in contender.scores]
        bench.raw.append({"day": exponent, "seed": seed, "policy": name, "scores": scores, "moved": contender.moved})
    return contenders


def relieve_a_straggler(bench: Bench) -> None:
    """Drops one actor to half its speed, under an unchanged load."""
    fleet = FLEETS[ROOMY]()
    slowed_A = fleet.speed_A.copy()
    slowed_A[0] /= 2
    slower = replace(fleet, speed_A=slowed_A)
    before, after, moved = [], [], []
    for seed in bench.seeds():
        load_LE = zipf_loads(np.random.default_rng(seed), NUM_LAYERS, NUM_EXPERTS, 1.0)
        plan = cold_plan(load_LE, NUM_EXPERTS_L, fleet)
        before.append(mean_balancedness(plan, load_LE, slower))
        policy = policy_named("share")
        seen = Observation(now_s=0.0, load_LE=load_LE, fleet=slower, layout=plan, budget_bytes=BUDGET_BYTES)
        decision, _ = policy.decide(seen, policy.first_state())
        after.append(mean_balancedness(decision.layout, load_LE, slower))
        moved.append(decision.moved_bytes / EXPERT_BYTES)
    bench.add("straggler at half speed: balancedness before", before)
    bench.add("straggler at half speed: balancedness after one decision", after, target=STRAGGLER_TARGET)
    bench.add("straggler at half speed: replicas moved, of 18560", moved, better="lower")


def stay_on_one_thread(module: str) -> None:
    """Restarts the module with ONE_THREAD set if it is not. NumPy's BLAS reads these variables once, at import."""
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | ONE_THREAD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two runs of everything, 40 windows")
    options = parser.parse_args()
    stay_on_one_thread("benchmarks.planner")
    console = Console()
    bench = Bench(effort=QUICK if options.quick else FULL, console=console)
    for part in (compare_cold_plans, compare_after_drift, relieve_a_straggler, compare_through_a_day):
        part(bench)
        console.print(f"done: {part.__name__}")
    versions = installed_versions(("moecluster", "numpy", "scipy"))
    report = Report(name="planner", rows=bench.rows, raw=bench.raw, versions=versions)
    report.print(console)
    if not options.quick:
        console.print(f"written: {report.write().name}")


if __name__ == "__main__":
    main()
