"""Commands on recorded and simulated loads."""

from pathlib import Path
from typing import Annotated

import typer

from moecluster.cli.common.console import make_console
from moecluster.cli.common.options import Address, Name, SecretFile

BudgetGb = Annotated[
    float | None,
    typer.Option(
        help="gigabytes that a decision may load; up to 3 times that may be borrowed from later decisions; "
        "default: 2 % of all slots, at least those of one actor"
    ),
]


def add_to(app: typer.Typer) -> None:
    """Registers these commands."""
    app.command(epilog="Example: moecluster record loads.jsonl --window-s 10 --for-s 3600")(record)
    app.command(
        epilog="Example: moecluster replay loads.jsonl --policy share --policy eplb --slots 10 --plot replay.png"
    )(replay)
    app.command(
        epilog="Example: moecluster simulate --actors 1000 --layers 58 --experts 256 --hours 24 --plot day.png"
    )(simulate)


def record(
    out: Annotated[str, typer.Argument(help="trace file; an existing trace is appended to")],
    window_s: Annotated[float, typer.Option(help="window length in seconds")] = 10.0,
    for_s: Annotated[float, typer.Option(help="seconds to record; 0: until Ctrl-C")] = 600.0,
    name: Name = None,
    address: Address = "",
    secret_file: SecretFile = "",
) -> None:
    """Record the load of the cluster's experts, window by window, to a trace file for replay."""
    from moecluster.cli.commands.record import record as run
    from moecluster.cli.common.cluster_choice import chosen

    run(chosen(name, address, secret_file), out, window_s, for_s, make_console())


def replay(
    trace: Annotated[Path, typer.Argument(help="trace file (moecluster record)")],
    policy: Annotated[list[str] | None, typer.Option(help="share, eplb or static; may be repeated")] = None,
    actors: Annotated[int | None, typer.Option(help="number of equal actors, instead of the recorded ones")] = None,
    slots: Annotated[int | None, typer.Option(help="slots per actor for replicas of each layer")] = None,
    budget_gb: BudgetGb = None,
    half_life_s: Annotated[
        float | None, typer.Option(help="half-life of the load window of decisions; default: the trace's window")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="write a plot here: .png, .svg or .pdf")] = None,
    json: Annotated[Path | None, typer.Option(help="write all results here as JSON")] = None,
) -> None:
    """Replay a trace against policies and actors, without a cluster: balancedness reached, bytes moved."""
    from moecluster.cli.commands.replay import ReplayChoice
    from moecluster.cli.commands.replay import replay as run

    choice = ReplayChoice(
        policies=policy or ("share",),
        num_actors=actors,
        slots=slots,
        budget_gb=budget_gb,
        half_life_s=half_life_s,
        plot=plot,
        json=json,
    )
    run(trace, choice, make_console())


def simulate(
    actors: Annotated[int, typer.Option(help="number of expert actors", min=1)] = 1000,
    layers: Annotated[int, typer.Option(help="number of MoE layers", min=1)] = 58,
    experts: Annotated[int, typer.Option(help="experts per layer", min=1)] = 256,
    top_k: Annotated[int, typer.Option(help="experts per token in each layer", min=1)] = 8,
    hours: Annotated[float, typer.Option(help="simulated hours, starting at midnight")] = 24.0,
    policy: Annotated[str, typer.Option(help="share, eplb or static")] = "share",
    slots: Annotated[
        int | None, typer.Option(help="slots per actor for replicas of each layer; default: for 1.25 per expert", min=1)
    ] = None,
    actors_per_node: Annotated[int, typer.Option(help="actors per node, which may die together", min=1)] = 8,
    zipf: Annotated[float, typer.Option(help="Zipf exponent of the experts' popularity", min=0.0)] = 1.0,
    utilization: Annotated[float, typer.Option(help="mean load, as a fraction of the balanced maximum")] = 0.6,
    mtbf_hours: Annotated[float, typer.Option(help="mean time between failures of one actor")] = 1000.0,
    decide_every: Annotated[int, typer.Option(help="minutes between decisions", min=1)] = 5,
    budget_gb: BudgetGb = None,
    seed: Annotated[int, typer.Option(help="seed of the load and the failures", min=0)] = 0,
    costs: Annotated[Path | None, typer.Option(help="result of benchmarks/layer.py to take the costs from")] = None,
    cost: Annotated[list[str] | None, typer.Option(help="one cost, such as row_s=2e-7; may be repeated")] = None,
    trace: Annotated[Path | None, typer.Option(help="write the simulated loads here as a trace for replay")] = None,
    growth: Annotated[bool, typer.Option(help="also measure the controller's work at several cluster sizes")] = True,
    plot: Annotated[Path | None, typer.Option(help="write a plot here: .png, .svg or .pdf")] = None,
    json: Annotated[Path | None, typer.Option(help="write all results here as JSON")] = None,
) -> None:
    """Simulate a day of thousands of actors: throughput, latency, failures, and the controller's cost."""
    from moecluster.cli.commands.simulate import SimulationChoice
    from moecluster.cli.commands.simulate import simulate as run

    choice = SimulationChoice(
        policy=policy,
        num_actors=actors,
        num_layers=layers,
        num_experts=experts,
        top_k=top_k,
        hours=hours,
        slots=slots,
        actors_per_node=actors_per_node,
        zipf=zipf,
        utilization=utilization,
        mtbf_hours=mtbf_hours,
        decide_every=decide_every,
        budget_gb=budget_gb,
        seed=seed,
        costs_file=costs,
        costs=cost or (),
        trace=trace,
        growth=growth,
        plot=plot,
        json=json,
    )
    run(choice, make_console())
