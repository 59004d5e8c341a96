"""The command `moecluster`. A user's mistake is one line on standard error and exit code 2.

A command's module is imported when the command runs: help comes at once, and Ray, which reads its authentication from
the environment when it is imported, is not imported before that is set.
"""

import signal
import sys
from typing import Annotated

import typer
from rich.console import Console

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


@app.command(epilog="Example: moecluster up demo    or: moecluster up ./Mixtral-tiny --set cluster.num_expert_actors=8")
def up(target: Target = "demo", settings: Settings = None) -> None:
    """Start a cluster that serves a model: a local Ray, expert actors, a router and a controller."""
    from actors.commands.cluster import up as run

    run(target, settings or (), Console())


@app.command(epilog="Example: moecluster status    or: moecluster status --json")
def status(name: Name = "moecluster", json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Show the actors of a cluster that is up: where they listen, what they hold, how often they were restarted."""
    from actors.commands.cluster import status as run

    run(name, json, Console())


@app.command(epilog="Example: moecluster down    or: moecluster down --name second")
def down(name: Name = "moecluster") -> None:
    """End a cluster: exactly what `up` started, and no other Ray."""
    from actors.commands.cluster import down as run

    run(name, Console())


@app.command(epilog='Example: moecluster generate demo "def main(" --max-new-tokens 64')
def generate(
    target: Target,
    prompt: Annotated[str, typer.Argument(help="the text to go on from")],
    max_new_tokens: Annotated[int, typer.Option(help="longest continuation in tokens", min=1)] = 128,
    settings: Settings = None,
) -> None:
    """Write a prompt's continuation token by token, through the cluster that is up, or one started for it."""
    from actors.commands.generate import generate as run

    run(target, prompt, max_new_tokens, settings or (), Console(stderr=True))


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
