"""The command `moecluster`. An error is one line on standard error, and an exit code (exit_codes.py).

A command's module is imported only when the command runs: --help is fast, and Ray, which reads its authentication from
the environment when imported, is not imported before that is set.
"""

import errno
import os
import sys
from typing import Annotated

import typer

from actors.signals import end_by_signals, signal_of
from moecluster import __version__
from moecluster.cli import (
    exit_codes,
    http_commands,
    job_commands,
    operation_commands,
    planning_commands,
    security_commands,
)
from moecluster.cli.common import completion
from moecluster.cli.common.console import make_console
from moecluster.cli.common.extras import need
from moecluster.cli.common.options import Address, Json, Name, SecretFile
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

Target = Annotated[
    str, typer.Argument(help="model directory, TOML file, or name of a preset", autocompletion=completion.targets)
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        help="override a setting, as in train.steps=100; may be repeated",
        show_default=False,
        autocompletion=completion.settings,
    ),
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


@app.command(epilog="Example: moecluster status    or: moecluster status --address head:20000 --secret-file moe.secret")
def status(
    name: Name = None,
    address: Address = "",
    secret_file: SecretFile = "",
    json: Json = False,
    timeout_s: Annotated[float, typer.Option(help="longest wait for actors that do not answer", min=0.5)] = 3.5,
) -> None:
    """Show a running cluster: its placement, actors, addresses, operations and problems."""
    from moecluster.cli.commands.status import status as run
    from moecluster.cli.common.cluster_choice import chosen

    if not run(chosen(name, address, secret_file), json, timeout_s, make_console()):
        raise typer.Exit(FAILED)


@app.command(epilog="Example: moecluster down    or: moecluster down --name second")
def down(name: Name = None, address: Address = "", secret_file: SecretFile = "") -> None:
    """Stop a cluster: exactly what `up` started, and no other Ray."""
    from moecluster.cli.commands.cluster import down as run
    from moecluster.cli.commands.cluster import down_at
    from moecluster.cli.common.cluster_choice import chosen

    choice = chosen(name, address, secret_file)
    if choice.address:
        down_at(choice, make_console())
    else:
        run(choice.name, make_console())


@app.command(
    epilog='Example: moecluster generate ./Mixtral-tiny "def main(" --max-new-tokens 64 --temperature 0.7 --seed 1'
)
def generate(
    target: Annotated[
        str, typer.Argument(help="model directory, TOML file, or name of a preset; left out with --address")
    ],
    prompt: Annotated[
        str | None, typer.Argument(help="text to continue; with --chat, a user's message", show_default=False)
    ] = None,
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
    address: Address = "",
    secret_file: SecretFile = "",
    settings: Settings = None,
) -> None:
    """Generate a continuation of a prompt, streamed, on the running cluster or on one started for it."""
    from moecluster.cli.commands.generate import generate as run
    from moecluster.cli.commands.generate import generate_at, given_options, words_of
    from moecluster.cli.common.cluster_choice import chosen

    options = given_options(max_new_tokens, temperature, top_p, top_k, seed, stop)
    choice = chosen(None, address, secret_file)
    target, prompt = words_of(choice, target, prompt)
    if choice.address:
        generate_at(choice, prompt, chat, options, settings or (), make_console(stderr=True))
    else:
        run(target, prompt, chat, options, settings or (), make_console(stderr=True))


Host = Annotated[str | None, typer.Option(help="address to listen on (serve.host)", show_default=False)]
Port = Annotated[int | None, typer.Option(help="port to listen on; 0: any (serve.port, 8000)", show_default=False)]
ApiKeysFile = Annotated[
    str | None, typer.Option(help="file of API keys, one per line (security.api_keys_file)", show_default=False)
]

SecretFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--secret-file",
        help="file with the secret of clusters at addresses: one for all, or one for each in order; default: "
        "$MOECLUSTER_SECRET_FILE",
        show_default=False,
    ),
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
        typer.Option(
            metavar="NAME=CLUSTER",
            help="another cluster's model, by the cluster's name or its controller's HOST:PORT; may be repeated",
            show_default=False,
        ),
    ] = None,
    secret_files: SecretFiles = None,
    random_weights: RandomWeights = False,
    settings: Settings = None,
) -> None:
    """Serve a model through an OpenAI-compatible HTTP API, on the running cluster or on one started for it."""
    need("serve", "moecluster serve")
    from moecluster.cli.commands.serve import GatewayOptions
    from moecluster.cli.commands.serve import serve as run

    options = GatewayOptions(
        host=host, port=port, api_keys_file=api_keys_file, model_name=model_name, secret_files=tuple(secret_files or ())
    )
    run(target, settings or (), options, also or (), make_console(), random_weights=random_weights)


@app.command(epilog="Example: moecluster gateway --model mixtral=moecluster --model small=10.0.0.7:20000")
def gateway(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=CLUSTER",
            help="model name and its cluster, by name or its controller's HOST:PORT; may be repeated",
            show_default=False,
        ),
    ] = None,
    secret_files: SecretFiles = None,
    host: Host = None,
    port: Port = None,
    api_keys_file: ApiKeysFile = None,
    settings: Settings = None,
) -> None:
    """Serve the models of running clusters through an OpenAI-compatible HTTP API. Starts no cluster."""
    need("serve", "moecluster gateway")
    from moecluster.cli.commands.serve import GatewayOptions
    from moecluster.cli.commands.serve import gateway as run

    options = GatewayOptions(host=host, port=port, api_keys_file=api_keys_file, secret_files=tuple(secret_files or ()))
    run(model or (), settings or (), options, make_console())


@app.command(epilog="Example: moecluster train demo --set train.steps=100    or: moecluster train my.toml")
def train(
    target: Target = "demo",
    data: Annotated[str | None, typer.Option(help="text file or directory to train on (train.data)")] = None,
    address: Address = "",
    secret_file: SecretFile = "",
    settings: Settings = None,
) -> None:
    """Train a model, each expert in its actor, on the running cluster or on one started for it."""
    from moecluster.cli.commands.train import train as run
    from moecluster.cli.commands.train import train_at
    from moecluster.cli.common.cluster_choice import chosen

    choice, given = chosen(None, address, secret_file), [*(settings or ()), *([f"train.data={data}"] if data else ())]
    if choice.address:
        train_at(choice, target, given, make_console())
    else:
        run(target, given, make_console())


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


@app.command(epilog="Example: moecluster doctor    or: moecluster doctor ./Mixtral -s cluster.metrics_port=9400 --json")
def doctor(
    target: Annotated[
        str | None,
        typer.Argument(
            help="what to start: model directory, TOML file, or name of a preset",
            show_default=False,
            autocompletion=completion.targets,
        ),
    ] = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Check whether a cluster can start on this host: what is wrong, and what to do."""
    from moecluster.cli.commands.doctor.command import doctor as run

    if not run(target, settings or (), json, make_console()):
        raise typer.Exit(FAILED)


for commands in (operation_commands, planning_commands, http_commands, job_commands, security_commands):
    commands.add_to(app)


def main() -> None:
    """The console script."""
    try:
        with end_by_signals():  # so that whatever was started is stopped
            app()
    except SystemExit as exc:
        if name := signal_of(exc.code):
            print(f"moecluster: ended by {name}", file=sys.stderr)
        if not exc.code and (why := _lost_output()):
            _complain(why)
            sys.exit(FAILED)
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
        lost = _lost_output()
        _complain(f"{exc.strerror}: {exc.filename}" if exc.filename else lost or _unwritten(exc))
        sys.exit(FAILED)


def _lost_output() -> str:
    """Returns why standard output cannot take what was printed, as on a full disk; empty if it can."""
    if sys.stdout is None:  # closed by whoever started the command: nothing was to be seen
        return ""
    try:
        sys.stdout.flush()
        return ""
    except OSError as exc:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # so that Python does not fail as well when it flushes at its end
        os.close(nowhere)
        # A reader that has gone has seen enough.
        return "" if isinstance(exc, BrokenPipeError) else _unwritten(exc)


def _unwritten(error: OSError) -> str:
    return f"the output cannot be written: {error.strerror}"


def _complain(text: str) -> None:
    print(f"moecluster: {' '.join(text.splitlines())}", file=sys.stderr)
