"""The command `moecluster`. An error is one line on standard error, and an exit code (exit_codes.py).

A command's module is imported only when the command runs: --help is fast, and Ray, which reads its authentication from
the environment when imported, is not imported before that is set.
"""

import errno
import sys
from typing import Annotated

import typer

from actors.signals import end_by_signals, signal_of
from moecluster import __version__
from moecluster.cli import exit_codes, http_commands, operation_commands, planning_commands, security_commands
from moecluster.cli.common.console import make_console
from moecluster.cli.common.extras import need
from moecluster.cli.common.options import Json, Name
from moecluster.cli.exit_codes import FAILED, exit_code
from moecluster.errors import MoeClusterError, UserError

# Errors of the system that are not bugs: reported in one line.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG)

app = typer.Typer(
    epilog=exit_codes.HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Target = Annotated[str, typer.Argument(help="model directory, TOML file, or name of a preset")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="override a setting, as in train.steps=100; may be repeated", show_default=False),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="use random weights for a preset or TOML file that was never trained")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"moecluster {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Serve and train Mixture-of-Experts models whose experts are services: Ray actors reached over gRPC."""


@app.command(
    epilog="Example: moecluster up ./Mixtral -s cluster.num_routers=2    or: moecluster up demo --random-weights"
)
def up(target: Target = "demo", settings: Settings = None, random_weights: RandomWeights = False) -> None:
    """Start a cluster that serves a model: a local Ray, expert actors, a router and a controller."""
    from moecluster.cli.commands.cluster import up as run

    run(target, settings or (), make_console(), random_weights=random_weights)


@app.command(epilog="Example: moecluster status    or: moecluster status --json")
def status(
    name: Name = "moecluster",
    json: Json = False,
    timeout_s: Annotated[float, typer.Option(help="longest wait for actors that do not answer", min=0.5)] = 3.5,
) -> None:
    """Show a running cluster: its placement, actors, addresses, operations and problems."""
    from moecluster.cli.commands.cluster import status as run

    if not run(name, json, timeout_s, make_console()):
        raise typer.Exit(FAILED)


@app.command(epilog="Example: moecluster down    or: moecluster down --name second")
def down(name: Name = "moecluster") -> None:
    """Stop a cluster: exactly what `up` started, and no other Ray."""
    from moecluster.cli.commands.cluster import down as run

    run(name, make_console())


@app.command(
    epilog='Example: moecluster generate ./Mixtral-tiny "def main(" --max-new-tokens 64 --temperature 0.7 --seed 1'
)
def generate(
    target: Target,
    prompt: Annotated[str, typer.Argument(help="text to continue; with --chat, a user's message")],
    max_new_tokens: Annotated[
        int | None, typer.Option(help="most tokens to generate (default: serve.max_new_tokens)", min=1)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="sampling temperature, 0: greedy (default: serve.temperature)")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="nucleus sampling; 0: off (default: serve.top_p)")] = None,
    top_k: Annotated[int | None, typer.Option(help="sample from the k likeliest tokens; 0: off")] = None,
    seed: Annotated[int | None, typer.Option(help="equal seeds sample equal output (default: serve.seed)")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="stop string; may be repeated")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="apply the model's chat template")] = False,
    settings: Settings = None,
) -> None:
    """Generate a continuation of a prompt, streamed, on the running cluster or on one started for it."""
    from moecluster.cli.commands.generate import generate as run
    from moecluster.cli.commands.generate import given_options

    options = given_options(max_new_tokens, temperature, top_p, top_k, seed, stop)
    run(target, prompt, chat, options, settings or (), make_console(stderr=True))


Host = Annotated[str | None, typer.Option(help="address to listen on (serve.host)", show_default=False)]
Port = Annotated[int | None, typer.Option(help="port to listen on; 0: any (serve.port, 8000)", show_default=False)]
ApiKeysFile = Annotated[
    str | None, typer.Option(help="file of API keys, one per line (security.api_keys_file)", show_default=False)
]


@app.command(
    epilog="Example: moecluster serve ./Mixtral-tiny --port 8080    or: moecluster serve demo --random-weights"
)
def serve(
    target: Target = "demo",
    host: Host = None,
    port: Port = None,
    api_keys_file: ApiKeysFile = None,
    model_name: Annotated[
        str | None, typer.Option(help="name of the served model (serve.model_name)", show_default=False)
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=CLUSTER", help="another cluster's model; may be repeated", show_default=False),
    ] = None,
    random_weights: RandomWeights = False,
    settings: Settings = None,
) -> None:
    """Serve a model through an OpenAI-compatible HTTP API, on the running cluster or on one started for it."""
    need("serve", "moecluster serve")
    from moecluster.cli.commands.serve import GatewayOptions
    from moecluster.cli.commands.serve import serve as run

    options = GatewayOptions(host=host, port=port, api_keys_file=api_keys_file, model_name=model_name)
    run(target, settings or (), options, also or (), make_console(), random_weights=random_weights)


@app.command(epilog="Example: moecluster gateway --model mixtral=moecluster --model small=second")
def gateway(
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=CLUSTER", help="model name and its cluster; may be repeated", show_default=False),
    ] = None,
    host: Host = None,
    port: Port = None,
    api_keys_file: ApiKeysFile = None,
    settings: Settings = None,
) -> None:
    """Serve the models of running clusters through an OpenAI-compatible HTTP API. Starts no cluster."""
    need("serve", "moecluster gateway")
    from moecluster.cli.commands.serve import GatewayOptions
    from moecluster.cli.commands.serve import gateway as run

    run(model or (), settings or (), GatewayOptions(host=host, port=port, api_keys_file=api_keys_file), make_console())


@app.command(epilog="Example: moecluster train demo --set train.steps=100    or: moecluster train my.toml")
def train(
    target: Target = "demo",
    data: Annotated[str | None, typer.Option(help="text file or directory to train on (train.data)")] = None,
    settings: Settings = None,
) -> None:
    """Train a model, each expert in its actor, on the running cluster or on one started for it."""
    from moecluster.cli.commands.train import train as run

    run(target, [*(settings or ()), *([f"train.data={data}"] if data else ())], make_console())


@app.command(epilog="Example: moecluster demo    or: moecluster demo --data ./my-texts")
def demo(
    data: Annotated[str | None, typer.Option(help="text file or directory to train on (train.data)")] = None,
    settings: Settings = None,
) -> None:
    """Train a small model, generate with it, show which experts serve which domain, and kill an expert actor."""
    from moecluster.cli.commands.demo import demo as run

    run(data, settings or (), make_console())


@app.command(epilog="Example: moecluster params mixtral    or: moecluster params demo --set model.num_experts=64")
def params(target: Target, settings: Settings = None) -> None:
    """Count the total and active parameters of a model from its configuration alone."""
    from moecluster.cli.commands.params import params as run

    run(target, settings or (), make_console())


for commands in (operation_commands, planning_commands, http_commands, security_commands):
    commands.add_to(app)


def main() -> None:
    """The console script."""
    try:
        with end_by_signals():  # so that whatever was started is stopped
            app()
    except SystemExit as exc:
        if name := signal_of(exc.code):
            print(f"moecluster: ended by {name}", file=sys.stderr)
        raise
    except UserError as exc:
        _complain(str(exc))
        sys.exit(exit_code(exc))
    except MoeClusterError as exc:
        _complain(f"{type(exc).__name__}: {exc}")
        sys.exit(exit_code(exc))
    except OSError as exc:
        if exc.errno not in _REFUSALS:
            raise  # a bug: show the traceback
        _complain(f"{exc.strerror}: {exc.filename}" if exc.filename else str(exc.strerror))
        sys.exit(FAILED)


def _complain(text: str) -> None:
    print(f"moecluster: {' '.join(text.splitlines())}", file=sys.stderr)
