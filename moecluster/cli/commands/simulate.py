"""simulate: simulates a day of a cluster, and measures how its controller scales."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from actors.places import check_file
from moecluster.cli.common.formatting import shown_part
from moecluster.cli.common.output_files import check_writable, write_report
from moecluster.cli.common.tables import make_table, show_table
from moecluster.errors import ConfigError, TraceError
from moecluster.placement.layout import Fleet
from moecluster.placement.policy.registry import policy_named
from moecluster.simulation.costs import BENCH_EXPERT_BYTES, Costs, calibrated
from moecluster.simulation.layouts import uniform_fleet, usual_budget_bytes
from moecluster.simulation.scaling_law import MeasuredSize, PowerLaw, fit_power_law, measure_sizes, sizes_around
from moecluster.simulation.scenario import (
    Scenario,
    SimulatedWindow,
    SimulationSummary,
    balanced_tokens_per_s,
    summarize,
)
from moecluster.simulation.simulator import Simulator
from moecluster.simulation.synthetic_load import LoadShape, SyntheticLoads
from moecluster.simulation.trace.format import TraceActor, TraceHeader, TraceLayer, TraceWindow
from moecluster.simulation.trace.writer import TraceWriter

MOST_ACTORS = 1e7  # a limit beyond it is not reported
REDUNDANCY = 1.25  # default slots per expert


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulationChoice:
    """The user's options. None: the default in the command's help."""

    policy: str
    num_actors: int
    num_layers: int
    num_experts: int
    top_k: int
    hours: float
    slots: int | None = None
    actors_per_node: int = 8
    zipf: float = 1.0
    utilization: float = 0.6
    mtbf_hours: float = Scenario.actor_mtbf_hours
    decide_every: int = Scenario.decide_every
    budget_gb: float | None = None
    seed: int = 0
    costs_file: Path | None = None
    costs: Sequence[str] = ()
    growth: bool = True
    trace: Path | None = None
    plot: Path | None = None
    json: Path | None = None


def simulate(choice: SimulationChoice, console: Console) -> None:
    """Simulates a day, shows the results, and measures the controller's work at several cluster sizes."""
    _check(choice)
    costs = _costs(choice)
    policy = policy_named(choice.policy)
    slots = choice.slots or -(-int(REDUNDANCY * choice.num_experts) // choice.num_actors)

    def make_fleet(num_actors: int) -> Fleet:
        expert_bytes_L = np.full(choice.num_layers, float(BENCH_EXPERT_BYTES))
        return uniform_fleet(num_actors, slots, expert_bytes_L, actors_per_node=choice.actors_per_node)

    fleet = make_fleet(choice.num_actors)
    scenario = Scenario(
        decide_every=choice.decide_every,
        budget_bytes=usual_budget_bytes(fleet) if choice.budget_gb is None else 1e9 * choice.budget_gb,
        actor_mtbf_hours=choice.mtbf_hours,
        seed=choice.seed,
    )
    most_per_s = balanced_tokens_per_s(fleet, choice.num_layers, choice.top_k, costs, scenario)
    shape = LoadShape(
        num_layers=choice.num_layers,
        num_experts=choice.num_experts,
        top_k=choice.top_k,
        tokens_per_s=choice.utilization * most_per_s,
        zipf=choice.zipf,
    )
    num_windows = max(round(choice.hours * 3600 / scenario.window_s), 2)
    loads = SyntheticLoads(shape, window_s=scenario.window_s, num_windows=num_windows, seed=choice.seed)
    simulator = Simulator(scenario, fleet, loads, policy, costs)
    windows = list(track(simulator.run(), "simulating", total=num_windows, console=console, transient=True))
    summary = summarize(windows)
    title = (
        f"{choice.policy} on {choice.num_actors:,} actors x {slots} slots, {choice.num_layers} layers x "
        f"{choice.num_experts} experts, {choice.hours:g} simulated hours"
    )
    console.print(title, highlight=False)
    show_table(_summary_table(summary, windows), console)
    if choice.trace is not None:
        _write_trace(choice.trace, loads, fleet)
        console.print(f"the day's loads, to replay: {choice.trace}", highlight=False)
    sizes: list[MeasuredSize] = []
    if choice.growth:
        wanted = sizes_around(choice.num_actors, -(-choice.num_experts // slots))
        measuring = measure_sizes(wanted, make_fleet, shape, lambda: policy_named(choice.policy), scenario, costs)
        sizes = list(track(measuring, "measuring sizes", total=len(wanted), console=console, transient=True))
        _show_growth(sizes, scenario, console)
    report = {
        "choice": {key: str(value) if isinstance(value, Path) else value for key, value in vars(choice).items()},
        "costs": dataclasses.asdict(costs),
        "scenario": dataclasses.asdict(scenario),
        "load": dataclasses.asdict(shape),
        "summary": dataclasses.asdict(summary),
        "sizes": [dataclasses.asdict(size) for size in sizes],
        "windows": [dataclasses.asdict(window) for window in windows],
    }
    write_report(choice.json, report, console)
    if choice.plot is not None:
        from moecluster.cli.common.plots import draw_simulation  # needs matplotlib

        draw_simulation(windows, sizes, title, choice.plot)
        console.print(f"as a picture: {choice.plot}", highlight=False)


def _write_trace(path: Path, loads: SyntheticLoads, fleet: Fleet) -> None:
    layer_bytes = enumerate(fleet.expert_bytes_L.tolist())
    header = TraceHeader(
        model=f"simulated: {loads.shape.num_layers} layers x {loads.shape.num_experts} experts",
        window_s=loads.window_s,
        layers=tuple(
            TraceLayer(layer=layer, experts=loads.shape.num_experts, expert_bytes=int(size))
            for layer, size in layer_bytes
        ),
        actors=tuple(
            TraceActor(name=f"expert-{actor}", slots=int(slots), node=f"node-{node}")
            for actor, (slots, node) in enumerate(zip(fleet.slots_A, fleet.node_A, strict=True))
        ),
    )
    try:
        with TraceWriter(path, header) as writer:
            for load in loads:
                writer.add(TraceWindow(time_s=load.time_s, counts_LE=load.counts_LE))
    except TraceError:
        path.unlink(missing_ok=True)  # a part of a day would pass for a day
        raise


def _check(choice: SimulationChoice) -> None:
    for name, value in (
        ("--hours", choice.hours),
        ("--utilization", choice.utilization),
        ("--mtbf-hours", choice.mtbf_hours),
        ("--budget-gb", choice.budget_gb),
    ):
        if value is not None and not value > 0:
            raise ConfigError(f"{name}: got {value:g}, expected more than 0")
    if not math.isfinite(choice.hours):
        raise ConfigError(f"--hours: got {choice.hours:g}, expected an end")
    if choice.top_k > choice.num_experts:
        raise ConfigError(f"--top-k: got {choice.top_k}, expected at most the {choice.num_experts} experts")
    check_writable(choice.plot, choice.json)
    if choice.trace is not None:
        if choice.trace.exists():
            raise ConfigError(f'--trace: "{choice.trace}" is there already; give another name')
        check_file("--trace", choice.trace)


def _costs(choice: SimulationChoice) -> Costs:
    """Returns the default costs, or those of a benchmark result, with single ones overridden by name."""
    costs = Costs() if choice.costs_file is None else calibrated(choice.costs_file)
    known = [field.name for field in dataclasses.fields(Costs)]
    for text in choice.costs:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(f'--cost: got "{text}", expected NAME=NUMBER with a name of {", ".join(known)}')
        try:
            number = float(value)
        except ValueError as error:
            raise ConfigError(f'--cost: got "{text}", expected a number after {name}=') from error
        costs = dataclasses.replace(costs, **{name: number})
    return costs


def _summary_table(summary: SimulationSummary, windows: Sequence[SimulatedWindow]) -> Table:
    table = make_table("", "value", prose=("", "value"), show_header=False)
    for name, value in (
        ("tokens that came, served", f"{summary.tokens:,.0f}, {shown_part(summary.served / summary.tokens, 2)}"),
        ("balancedness, mean", _or_nothing(summary.mean_balancedness, ".4f")),
        ("a step through all MoE layers, mean (worst)", _seconds(summary.mean_step_s, summary.worst_step_s)),
        ("waiting before it, mean (worst)", _seconds(summary.mean_wait_s, summary.worst_wait_s)),
        ("availability", f"{shown_part(summary.mean_availability, 4)} of tokens met no lost expert"),
        ("actors that died", f"{summary.deaths}"),
        ("moved by the first plan, by all others", f"{_gb(summary.cold_bytes)}, {_gb(summary.moved_bytes)}"),
        ("replicas at the end", f"{windows[-1].replicas:,}"),
        ("decisions", f"{summary.decisions}"),
        ("a decision (measured), median (worst)", f"{_ms(summary.median_decide_s)} ({_ms(summary.max_decide_s)})"),
        ("taking counters in (measured), median", _ms(summary.median_observe_s)),
        ("the controller's part of one core", f"{100 * summary.controller_part:.3f} %"),
    ):
        table.add_row(name, value)
    return table


def _or_nothing(value: float | None, form: str) -> str:
    return "nothing to judge" if value is None else format(value, form)


def _seconds(mean_s: float | None, worst_s: float | None) -> str:
    return "no token was served" if mean_s is None or worst_s is None else f"{mean_s:.3f} s ({worst_s:.3f} s)"


def _show_growth(sizes: Sequence[MeasuredSize], scenario: Scenario, console: Console) -> None:
    """Shows the controller's work by size, its power law, and the size at which it fills the time between decisions."""
    period_s = scenario.window_s * scenario.decide_every
    columns = ("actors", "replicas", "counters", "first plan", "decision", "of the period", "copies (simulated)")
    table = make_table(*columns, right=columns)
    for size in sizes:
        table.add_row(
            f"{size.actors:,}",
            f"{size.replicas:,}",
            _ms(size.observe_s),
            _ms(size.cold_decide_s),
            _ms(size.decide_s),
            f"{100 * size.decide_s / period_s:.3f} %",
            f"{size.apply_s:.2f} s",
        )
    show_table(table, console)
    actors = [size.actors for size in sizes]
    laws = {
        "taking counters in": fit_power_law(actors, [size.observe_s for size in sizes]),
        "the first plan": fit_power_law(actors, [size.cold_decide_s for size in sizes]),
        "a decision": fit_power_law(actors, [size.decide_s for size in sizes]),
    }
    for name, law in laws.items():
        console.print(f"  {name} grows as {_law(law, period_s)}", highlight=False, soft_wrap=True)
    first = min(laws, key=lambda name: laws[name].size_at(period_s))
    if laws[first].size_at(period_s) <= MOST_ACTORS:
        console.print(f"  so the bottleneck, if the cluster grows, is {first}", highlight=False, soft_wrap=True)


def _law(law: PowerLaw, period_s: float) -> str:
    limit = law.size_at(period_s)
    if limit > MOST_ACTORS:
        return f"actors^{law.exponent:.2f}: far from filling the {period_s:g} s between decisions"
    return f"actors^{law.exponent:.2f}: it would fill the {period_s:g} s between decisions at {limit:,.0f} actors"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
