"""The commands about recorded and simulated loads."""

from pathlib import Path
from typing import Annotated

import typer

from moecluster.cli.common.console import make_console
from moecluster.cli.common.options import Name

BudgetGb = Annotated[
    float | None,
    typer.Option(
        help="that a decision may load, and borrow 3 times from later ones; "
        "default: 2 % of all slots, at least one actor"
    ),
]


def add_to(app: typer.Typer) -> None:
    """Makes these commands part of the command line."""
    app.command(epilog="Example: moecluster record loads.jsonl --window-s 10 --for-s 3600")(record)
    app.command(
        epilog="Example: moecluster replay loads.jsonl --policy share --policy eplb --slots 10 --plot replay.png"
    )(replay)
    app.command(
        epilog="Example: moecluster simulate --actors 1000 --layers 58 --experts 256 --hours 24 --plot day.png"
    )(simulate)


def record(
    out: Annotated[str, typer.Argument(help="the trace; one that is there already is gone on with")],
    window_s: Annotated[float, typer.Option(help="length of a window in seconds")] = 10.0,
    for_s: Annotated[float, typer.Option(help="how long to record; 0: until Ctrl-C")] = 600.0,
    name: Name = "moecluster",
) -> None:
    """Write what the cluster's experts have to do to a file, window by window, for replay and simulate."""
    from moecluster.cli.commands.record import record as run

    run(name, out, window_s, for_s, make_console())


def replay(
    trace: Annotated[Path, typer.Argument(help="a trace of loads, as moecluster record writes it")],
    policy: Annotated[list[str] | None, typer.Option(help="share, eplb or static; may be repeated")] = None,
    actors: Annotated[int | None, typer.Option(help="equal actors instead of the recorded ones")] = None,
    slots: Annotated[int | None, typer.Option(help="replicas of each layer that an actor has room for")] = None,
    budget_gb: BudgetGb = None,
    half_life_s: Annotated[
        float | None, typer.Option(help="of the load that decisions are taken on; default: the trace's window")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="draw a picture here: .png, .svg or .pdf")] = None,
    json: Annotated[Path | None, typer.Option(help="write every figure here")] = None,
) -> None:
    """Replay a trace against any policy and any actors, without a cluster: how even, at how many moved bytes."""
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
    actors: Annotated[int, typer.Option(help="expert actors", min=1)] = 1000,
    layers: Annotated[int, typer.Option(help="layers with experts", min=1)] = 58,
    experts: Annotated[int, typer.Option(help="experts of each layer", min=1)] = 256,
    top_k: Annotated[int, typer.Option(help="experts that each token visits in a layer", min=1)] = 8,
    hours: Annotated[float, typer.Option(help="simulated time, from midnight on")] = 24.0,
    policy: Annotated[str, typer.Option(help="share, eplb or static")] = "share",
    slots: Annotated[
        int | None, typer.Option(help="replicas of each layer for an actor; default: 1.25 an expert", min=1)
    ] = None,
    actors_per_node: Annotated[int, typer.Option(help="actors that may die together", min=1)] = 8,
    zipf: Annotated[float, typer.Option(help="skew of the experts' popularity", min=0.0)] = 1.0,
    utilisation: Annotated[float, typer.Option(help="mean load, as a part of what perfect spreading serves")] = 0.6,
    mtbf_hours: Annotated[float, typer.Option(help="mean time between the deaths of one actor")] = 1000.0,
    decide_every: Annotated[int, typer.Option(help="minutes between decisions", min=1)] = 5,
    budget_gb: BudgetGb = None,
    seed: Annotated[int, typer.Option(help="of the load and the deaths", min=0)] = 0,
    costs: Annotated[Path | None, typer.Option(help="a result of benchmarks/layer.py to take the costs from")] = None,
    cost: Annotated[list[str] | None, typer.Option(help="a cost by name, such as row_s=2e-7; may be repeated")] = None,
    trace: Annotated[Path | None, typer.Option(help="write the day's loads here, to replay them")] = None,
    growth: Annotated[bool, typer.Option(help="measure the controller's work at several sizes as well")] = True,
    plot: Annotated[Path | None, typer.Option(help="draw a picture here: .png, .svg or .pdf")] = None,
    json: Annotated[Path | None, typer.Option(help="write every figure here")] = None,
) -> None:
    """Simulate a day of thousands of actors: throughput, delay, failures, and what the controller costs."""
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
        utilisation=utilisation,
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
