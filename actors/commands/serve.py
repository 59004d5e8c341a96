"""serve and front: the HTTP front over clusters that are up, one of which `serve` may bring up for itself.

The front is small, and a cluster is brought up with Ray and transformers: that is done by `moecluster up`, in a process
of its own.
"""

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import typer
from prometheus_client import disable_created_metrics
from rich.console import Console

from actors import state
from actors.commands.cluster import found
from actors.commands.target import read_target
from actors.commands.weights import RANDOM_WEIGHTS, refuse_another_model, refuse_trained, trained_model, weights_in
from actors.launch import credentials_of, take_down
from actors.settings import CONTROLLER, is_router
from moecluster.config import Config, override, parse_override, read_config
from moecluster.errors import ConfigError, ResourceError, Unavailable
from moecluster.rpc.credentials import read_secret
from moecluster.serving.front.router_directory import Whereabouts
from moecluster.serving.front.server import FrontServer, ModelSource, check_names, keys_for

SELF = (sys.executable, "-c", "from actors.cli import main; main()")
STATUS_TIMEOUT_S = 60.0
ENDING_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class FrontOptions:
    """What the command line says of the front; None: as the settings say."""

    host: str | None = None
    port: int | None = None
    api_keys_file: str | None = None
    model_name: str | None = None

    def on(self, config: Config) -> Config:
        """The settings with these laid on them. Raises ConfigError."""
        overrides = {
            "serve.host": self.host,
            "serve.port": self.port,
            "serve.model_name": self.model_name,
            "security.api_keys_file": self.api_keys_file,
        }
        return read_config(override(config.to_tables(), overrides))


def serve(
    target: str,
    settings: Sequence[str],
    options: FrontOptions,
    also: Sequence[str],
    console: Console,
    *,
    random_weights: bool = False,
) -> None:
    """Serves a model over HTTP until it is ended; a cluster that was brought up for it ends then too.

    random_weights: a fresh model, where nothing is trained.
    """
    config = options.on(read_target(target, settings))
    name = config.serve.model_name
    cluster = config.cluster.name
    models = [(name, cluster), *(_name_and_cluster(text) for text in also)]
    check_names([name for name, _ in models])
    for _, other in models[1:]:
        found(other)  # one that is not up is said before anything is started
    is_up = state.load(cluster) is not None
    if is_up:
        refuse_another_model(found(cluster), config, target)
    else:
        state.check()
    server = _listen(config)  # a port in use, or a wrong key file, is said before a cluster is started
    if is_up:
        _run(server, models, console)
        return
    if random_weights:
        refuse_trained(config)
    else:
        trained_model(config, target, "serve")
    try:
        named = [*settings, f"serve.model_name={json.dumps(name)}"]
        _bring_up(target, named, *((RANDOM_WEIGHTS,) if random_weights else ()))
        _run(server, models, console)
    finally:
        started = state.load(cluster)
        if started is not None:
            with _undisturbed(), console.status(f"ending {cluster}"):
                take_down(started)
            console.print(f"cluster {cluster} is down")


def front(models: Sequence[str], settings: Sequence[str], options: FrontOptions, console: Console) -> None:
    """Serves the models of clusters that are up over HTTP, until it is ended."""
    config = options.on(read_config(override({}, dict(parse_override(text) for text in settings))))
    named = [_name_and_cluster(text) for text in models]
    check_names([name for name, _ in named])
    for _, cluster in named:
        found(cluster)
    _run(_listen(config), named, console)


def _listen(config: Config) -> FrontServer:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    disable_created_metrics()
    return FrontServer(config.serve, keys_for(config.serve, config.security))


def _run(server: FrontServer, models: Sequence[tuple[str, str]], console: Console) -> None:
    """models: the name of each, and its cluster."""
    sources = [_source(name, cluster, alone=len(models) == 1) for name, cluster in models]
    names = ", ".join(name for name, _ in models)
    key = ' -H "Authorization: Bearer KEY"' if server.keys else ""
    body = json.dumps({"model": sources[0].name, "prompt": "def add(a, b):", "max_tokens": 32})
    lines = (
        *(f"{name}: {weights_in(found(cluster).model)}" for name, cluster in models),
        f"serving {names} at http://{server.address}/v1 until Ctrl-C; try",
        f"curl http://{server.address}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'",
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    with suppress(KeyboardInterrupt):  # raised again when all answers have ended
        server.run(sources)


def _source(name: str, cluster: str, *, alone: bool) -> ModelSource:
    up = found(cluster)
    seeds = Whereabouts(routers=up.router_addresses, controller=up.controller_address, credentials=credentials_of(up))
    # A model that is alone also answers to its cluster's name.
    return ModelSource(
        name=name, cluster=cluster, alias=cluster if alone else "", seeds=seeds, rediscover=lambda: _ask_ray(cluster)
    )


def _name_and_cluster(text: str) -> tuple[str, str]:
    name, separator, cluster = text.rpartition("=")
    if not (separator and name and cluster):
        raise ConfigError(f'model: got "{text}", expected NAME=CLUSTER, for example mixtral=moecluster')
    return name, cluster


def _bring_up(target: str, settings: Sequence[str], *options: str) -> None:
    """Raises typer.Exit if it fails, which it has said then itself. Interrupted, it leaves nothing behind."""
    words = [word for setting in settings for word in ("--set", setting)]
    # Not of our terminal's group: it is ended once, by us, and not amid its own clearing up.
    with subprocess.Popen([*SELF, "up", target, *words, *options], start_new_session=True) as process:
        try:
            code = process.wait()  # until `up` is done, whose waits have bounds of their own, or a signal comes
        except BaseException:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_TIMEOUT_S)
            process.kill()  # fine if it has ended
            raise
    if code:
        raise typer.Exit(code)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C, or what supervisors send twice, leaves no half of a cluster behind. Only for what ends soon."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_ray(cluster: str) -> Whereabouts:
    """Where the actors of a cluster are now. Joining Ray takes seconds, and a process of its own."""
    command = [*SELF, "status", "--json", "--name", cluster]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STATUS_TIMEOUT_S, start_new_session=True)
        done.check_returncode()
        actors = json.loads(done.stdout)["actors"]
        addresses = {name: str(reached["address"]) for name, reached in actors.items() if reached is not None}
    except subprocess.CalledProcessError as exc:
        raise ResourceError(f"moecluster status: {exc.stderr.strip()[-300:]}") from exc
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise Unavailable(f"moecluster status: {type(exc).__name__}") from exc
    noted = state.load(cluster)
    return Whereabouts(
        routers=tuple(address for name, address in addresses.items() if is_router(name)),
        controller=addresses.get(CONTROLLER, ""),
        credentials=read_secret(noted.secret_file) if noted is not None and noted.secret_file else None,
    )
