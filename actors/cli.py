"""The command `moecluster`. A user's mistake is one line on standard error and exit code 2.

A command's module is imported when the command runs: help comes at once, and Ray, which reads its authentication from
the environment when it is imported, is not imported before that is set.
"""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from actors import cli_requests
from moecluster.errors import MoeClusterError, UserError

app = typer.Typer(
    help="Mixture-of-Experts models whose experts are services: Ray actors reached over gRPC.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Target = Annotated[str, typer.Argument(help="a model directory, a TOML file, or a preset's name")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="a setting, for example train.steps=100; may be repeated", show_default=False),
]
Name = Annotated[str, typer.Option(help="the cluster's name (cluster.name)")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
OperationId = Annotated[
    str, typer.Option("--id", help="the operation's id: the same again asks for nothing new", show_default=False)
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="wait until it is done")]


@app.command(epilog="Example: moecluster up demo    or: moecluster up ./Mixtral-tiny --set cluster.num_expert_actors=8")
def up(target: Target = "demo", settings: Settings = None) -> None:
    """Start a cluster that serves a model: a local Ray, expert actors, a router and a controller."""
    from actors.commands.cluster import up as run

    run(target, settings or (), Console())


@app.command(epilog="Example: moecluster status    or: moecluster status --json")
def status(name: Name = "moecluster", json: Json = False) -> None:
    """Show a cluster that is up: its placement, its actors, where they listen, what they hold, what is under way."""
    from actors.commands.cluster import status as run

    run(name, json, Console())


@app.command(epilog="Example: moecluster down    or: moecluster down --name second")
def down(name: Name = "moecluster") -> None:
    """End a cluster: exactly what `up` started, and no other Ray."""
    from actors.commands.cluster import down as run

    run(name, Console())


@app.command(epilog='Example: moecluster generate demo "def main(" --max-new-tokens 64 --temperature 0.7 --seed 1')
def generate(
    target: Target,
    prompt: Annotated[str, typer.Argument(help="the text to go on from; with --chat, what a user says")],
    max_new_tokens: Annotated[int, typer.Option(help="longest continuation in tokens", min=1)] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy [default: serve.temperature]")] = None,
    top_p: Annotated[float | None, typer.Option(help="0 is off [default: serve.top_p]")] = None,
    top_k: Annotated[int | None, typer.Option(help="only so many tokens; 0 is off")] = None,
    seed: Annotated[int | None, typer.Option(help="the same draws the same text [default: serve.seed]")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="a text that ends it; may be repeated")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="write an answer, by the model's chat template")] = False,
    settings: Settings = None,
) -> None:
    """Write a prompt's continuation token by token, through the cluster that is up, or one started for it."""
    from actors.commands.generate import generate as run
    from actors.commands.generate import given_options

    options = given_options(max_new_tokens, temperature, top_p, top_k, seed, stop)
    run(target, prompt, chat, options, settings or (), Console(stderr=True))


Host = Annotated[str | None, typer.Option(help="address to listen on (serve.host)", show_default=False)]
Port = Annotated[int | None, typer.Option(help="port to listen on; 0: any (serve.port, 8000)", show_default=False)]
ApiKeysFile = Annotated[
    str | None, typer.Option(help="API keys, one a line (security.api_keys_file)", show_default=False)
]


@app.command(epilog="Example: moecluster serve demo    or: moecluster serve ./Mixtral-tiny --port 8080")
def serve(
    target: Target = "demo",
    host: Host = None,
    port: Port = None,
    api_keys_file: ApiKeysFile = None,
    model_name: Annotated[
        str | None, typer.Option(help="the model's name (serve.model_name)", show_default=False)
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=CLUSTER", help="another cluster's model; may be repeated", show_default=False),
    ] = None,
    settings: Settings = None,
) -> None:
    """Serve a model over HTTP as OpenAI does, through the cluster that is up, or one started for it."""
    from actors.commands.serve import FrontOptions
    from actors.commands.serve import serve as run

    options = FrontOptions(host=host, port=port, api_keys_file=api_keys_file, model_name=model_name)
    run(target, settings or (), options, also or (), Console())


@app.command(epilog="Example: moecluster front --model mixtral=moecluster --model small=second")
def front(
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=CLUSTER", help="a model and its cluster; may be repeated", show_default=False),
    ] = None,
    host: Host = None,
    port: Port = None,
    api_keys_file: ApiKeysFile = None,
    settings: Settings = None,
) -> None:
    """Serve the models of clusters that are up over HTTP, and start none."""
    from actors.commands.serve import FrontOptions
    from actors.commands.serve import front as run

    run(model or (), settings or (), FrontOptions(host=host, port=port, api_keys_file=api_keys_file), Console())


@app.command(epilog="Example: moecluster train demo --set train.steps=100    or: moecluster train my.toml")
def train(
    target: Target = "demo",
    data: Annotated[str | None, typer.Option(help="text file or directory to train on (train.data)")] = None,
    settings: Settings = None,
) -> None:
    """Train a model, each expert in its actor, in the cluster that is up, or in one started for it."""
    from actors.commands.train import train as run

    run(target, [*(settings or ()), *([f"train.data={data}"] if data else ())], Console())


@app.command(epilog="Example: moecluster demo    or: moecluster demo --data ./my-texts")
def demo(
    data: Annotated[str | None, typer.Option(help="text file or directory to train on (train.data)")] = None,
    settings: Settings = None,
) -> None:
    """Train a small model, write texts with it, see which experts serve what, and kill an expert actor meanwhile."""
    from actors.commands.demo import demo as run

    run(data, settings or (), Console())


@app.command(epilog="Example: moecluster params mixtral    or: moecluster params demo --set model.num_experts=64")
def params(target: Target, settings: Settings = None) -> None:
    """Count total and active parameters of a model from its configuration alone."""
    from actors.commands.params import params as run

    run(target, settings or (), Console())


@app.command(epilog="Example: moecluster scale 4    or: moecluster scale --routers 2 --id evening --no-wait")
def scale(
    number: Annotated[
        int | None, typer.Argument(metavar="N", help="how many expert actors there shall be", show_default=False)
    ] = None,
    routers: Annotated[
        int | None, typer.Option(help="how many routers there shall be, instead of N", show_default=False)
    ] = None,
    operation_id: OperationId = "",
    wait: Wait = True,
    name: Name = "moecluster",
) -> None:
    """Start expert actors or routers, or empty and end some, while the cluster serves."""
    from actors.commands.operations import scale as run

    run(name, number, routers, operation_id, wait, Console())


@app.command(epilog="Example: moecluster drain expert-1    or: moecluster drain host-7")
def drain(
    node: Annotated[str, typer.Argument(metavar="NODE|ACTOR", help="a node, or the name of one expert actor")],
    operation_id: OperationId = "",
    wait: Wait = True,
    name: Name = "moecluster",
) -> None:
    """Move all experts off a node or an actor, while they serve; then it may go."""
    from actors.commands.operations import drain as run

    run(name, node, operation_id, wait, Console())


@app.command(epilog="Example: moecluster place 3/17 expert-0 expert-2    or: moecluster place 3/17 --nowhere")
def place(
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="layer/index")],
    actors: Annotated[list[str] | None, typer.Argument(metavar="ACTOR", help="where it shall stand")] = None,
    nowhere: Annotated[bool, typer.Option("--nowhere", help="unload it until a token wants it")] = False,
    operation_id: OperationId = "",
    wait: Wait = True,
    name: Name = "moecluster",
) -> None:
    """Let an expert stand on exactly these actors, while it serves."""
    from actors.commands.operations import place as run

    run(name, expert, actors or (), nowhere, operation_id, wait, Console())


@app.command(
    epilog="Example: moecluster update ./Mixtral-v2    or: moecluster update ./tuned --experts 3/7 --keep-trunk"
)
def update(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="a checkpoint of the same shape, which all nodes see")
    ],
    experts: Annotated[
        list[str] | None,
        typer.Option(help="take only these experts from it, layer/index or 4/*; may be repeated", show_default=False),
    ] = None,
    keep_trunk: Annotated[bool, typer.Option("--keep-trunk", help="take only experts from it")] = False,
    out: Annotated[
        str,
        typer.Option(
            help="where the checkpoint is put together, if it takes only a part; default: beside the one served",
            show_default=False,
        ),
    ] = "",
    operation_id: OperationId = "",
    wait: Wait = True,
    name: Name = "moecluster",
) -> None:
    """Replace weights while they serve: texts that are begun end with the old ones, and no request fails."""
    from actors.commands.update import update as run

    run(name, directory, experts or (), keep_trunk, out, operation_id, wait, Console())


@app.command(epilog="Example: moecluster plan --dry-run    or: moecluster plan --policy eplb --json")
def plan(
    policy: Annotated[
        str, typer.Option(help="the policy to ask; by default the cluster's (controller.policy)", show_default=False)
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="change nothing, which a plan never does", show_default=False)
    ] = True,
    json: Json = False,
    name: Name = "moecluster",
) -> None:
    """Show what a policy would do to the cluster now: what would move, the predicted gain, the bytes."""
    from actors.commands.plan import plan as run

    run(name, policy, json, Console())


@app.command(epilog="Example: moecluster operations    or: moecluster operations --limit 100 --json")
def operations(
    limit: Annotated[int, typer.Option(help="how many, the newest first; 0: all that are kept", min=0)] = 20,
    json: Json = False,
    name: Name = "moecluster",
) -> None:
    """List what the controller does and has done to placement and size."""
    from actors.commands.operations import operations as run

    run(name, limit, json, Console())


@app.command(epilog="Example: moecluster explain rebalance-5f0c11d2")
def explain(
    operation: Annotated[str, typer.Argument(help="its id, as moecluster operations lists it")],
    json: Json = False,
    name: Name = "moecluster",
) -> None:
    """Say why an operation was begun, how far it is, what it moved, and its predicted and measured gain."""
    from actors.commands.operations import explain as run

    run(name, operation, json, Console())


@app.command(epilog="Example: moecluster record loads.jsonl --window-s 10 --for-s 3600")
def record(
    out: Annotated[str, typer.Argument(help="the trace; one that is there already is gone on with")],
    window_s: Annotated[float, typer.Option(help="length of a window in seconds")] = 10.0,
    for_s: Annotated[float, typer.Option(help="how long to record; 0: until Ctrl-C")] = 600.0,
    name: Name = "moecluster",
) -> None:
    """Write what the cluster's experts have to do to a file, window by window, for replay and simulate."""
    from actors.commands.record import record as run

    run(name, out, window_s, for_s, Console())


@app.command(epilog="Example: moecluster replay loads.jsonl --policy share --policy eplb --slots 10 --plot replay.png")
def replay(
    trace: Annotated[Path, typer.Argument(help="a trace of loads, as moecluster record writes it")],
    policy: Annotated[list[str] | None, typer.Option(help="share, eplb or static; may be repeated")] = None,
    actors: Annotated[int | None, typer.Option(help="equal actors instead of the recorded ones")] = None,
    slots: Annotated[int | None, typer.Option(help="replicas of each layer that an actor has room for")] = None,
    budget_gb: Annotated[
        float | None, typer.Option(help="most that a decision may load; default: 2 % of all slots, at least one actor")
    ] = None,
    half_life_s: Annotated[
        float | None, typer.Option(help="of the load that decisions are taken on; default: the trace's window")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="draw a picture here: .png, .svg or .pdf")] = None,
    json: Annotated[Path | None, typer.Option(help="write every figure here")] = None,
) -> None:
    """Replay a trace against any policy and any actors, without a cluster: how even, at how many moved bytes."""
    from actors.commands.replay import ReplayChoice
    from actors.commands.replay import replay as run

    choice = ReplayChoice(
        policies=policy or ("share",),
        num_actors=actors,
        slots=slots,
        budget_gb=budget_gb,
        half_life_s=half_life_s,
        plot=plot,
        json=json,
    )
    run(trace, choice, Console())


@app.command(epilog="Example: moecluster simulate --actors 1000 --layers 58 --experts 256 --hours 24 --plot day.png")
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
    budget_gb: Annotated[
        float | None, typer.Option(help="most that a decision may load; default: 2 % of all slots, at least one actor")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the load and the deaths", min=0)] = 0,
    costs: Annotated[Path | None, typer.Option(help="a result of benchmarks/layer.py to take the costs from")] = None,
    cost: Annotated[list[str] | None, typer.Option(help="a cost by name, such as row_s=2e-7; may be repeated")] = None,
    trace: Annotated[Path | None, typer.Option(help="write the day's loads here, to replay them")] = None,
    growth: Annotated[bool, typer.Option(help="measure the controller's work at several sizes as well")] = True,
    plot: Annotated[Path | None, typer.Option(help="draw a picture here: .png, .svg or .pdf")] = None,
    json: Annotated[Path | None, typer.Option(help="write every figure here")] = None,
) -> None:
    """Simulate a day of thousands of actors: throughput, delay, failures, and what the controller costs."""
    from actors.commands.simulate import SimulationChoice
    from actors.commands.simulate import simulate as run

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
    run(choice, Console())


cli_requests.add_to(app)


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    try:
        app()
    except UserError as exc:
        print(f"moecluster: {exc}", file=sys.stderr)
        sys.exit(2)
    except MoeClusterError as exc:
        print(f"moecluster: {type(exc).__name__}: {exc}", file=sys.stderr)
        sys.exit(1)
