"""serve and gateway: run the HTTP gateway for running clusters, one of which `serve` may bring up for itself.

The gateway is small, while bringing up a cluster needs Ray and transformers: `moecluster up` does that, in a process of
its own.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import typer
from prometheus_client import disable_created_metrics
from rich.console import Console

from actors import cluster_file
from actors.launch import credentials_of, take_down
from actors.names import CONTROLLER, is_router
from actors.signals import undisturbed
from moecluster.cli.common.lookup import found
from moecluster.cli.common.model_target import read_target
from moecluster.cli.common.model_weights import (
    RANDOM_WEIGHTS,
    refuse_another_model,
    refuse_trained,
    trained_model,
    weights_in,
)
from moecluster.config import Config, read_config
from moecluster.config.load import override, parse_override
from moecluster.errors import ClusterEnded, ConfigError, Unavailable
from moecluster.gateway.router_discovery import ClusterAddresses
from moecluster.gateway.server import GatewayServer, ModelSource, check_names, keys_for

SELF = (sys.executable, "-c", "from moecluster.cli.app import main; main()")
POLL_S = 20.0  # for Ray to find the actors
STATUS_TIMEOUT_S = 60.0
ENDING_TIMEOUT_S = 60.0
ENDING_POLL_S = 0.2

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """The gateway's command-line options; None: as configured."""

    host: str | None = None
    port: int | None = None
    api_keys_file: str | None = None
    model_name: str | None = None

    def on(self, config: Config) -> Config:
        """Returns the configuration with these overrides. Raises ConfigError."""
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
    options: GatewayOptions,
    also: Sequence[str],
    console: Console,
    *,
    random_weights: bool = False,
) -> None:
    """Serves a model over HTTP until it is stopped; a cluster that was brought up for it is then taken down.

    random_weights: serve a fresh model if nothing is trained.
    """
    config = options.on(read_target(target, settings))
    name = config.serve.model_name
    cluster = config.cluster.name
    models = [(name, cluster), *(_name_and_cluster(text) for text in also)]
    check_names([name for name, _ in models])
    for _, other in models[1:]:
        found(other)  # fails before anything is started
    is_up = cluster_file.load(cluster) is not None
    if is_up:
        refuse_another_model(found(cluster), config, target)
    else:
        cluster_file.check()
    server = _listen(config)  # fails on a port in use or a wrong key file before a cluster is started
    if is_up:
        _run(server, models, console)
        return
    if random_weights:
        refuse_trained(config)
    else:
        trained_model(config, target, "serve")
    try:
        named = [*settings, f"serve.model_name={json.dumps(name)}"]
        words = [word for setting in named for word in ("--set", setting)]
        own = ServedCluster(
            cluster,
            (target, *words, *((RANDOM_WEIGHTS,) if random_weights else ())),
            restarts=config.serve.max_restarts,
            ending=lambda: server.ending,
        )
        if code := own.bring_up():
            raise typer.Exit(code)
        _run(server, models, console, {cluster: own.find})
    finally:
        started = cluster_file.load(cluster)
        if started is not None:
            with undisturbed(), console.status(f"ending {cluster}"):
                take_down(started)
            console.print(f"cluster {cluster} is down")


def gateway(models: Sequence[str], settings: Sequence[str], options: GatewayOptions, console: Console) -> None:
    """Serves the models of running clusters over HTTP, until it is stopped."""
    config = options.on(read_config(override({}, dict(parse_override(text) for text in settings))))
    named = [_name_and_cluster(text) for text in models]
    check_names([name for name, _ in named])
    for _, cluster in named:
        found(cluster)
    _run(_listen(config), named, console)


def _listen(config: Config) -> GatewayServer:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    disable_created_metrics()
    return GatewayServer(config.serve, keys_for(config.serve, config.security))


def _run(
    server: GatewayServer,
    models: Sequence[tuple[str, str]],
    console: Console,
    finders: Mapping[str, Callable[[], ClusterAddresses]] | None = None,
) -> None:
    """models: (name, cluster) pairs. finders: by cluster, how to find it again; default: ask Ray."""
    found_by = finders or {}
    sources = [
        _source(name, cluster, alone=len(models) == 1, rediscover=found_by.get(cluster)) for name, cluster in models
    ]
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
    with suppress(KeyboardInterrupt):  # raised again once all responses have ended
        server.run(sources)


def _source(
    name: str, cluster: str, *, alone: bool, rediscover: Callable[[], ClusterAddresses] | None = None
) -> ModelSource:
    # A single model also answers to its cluster's name.
    return ModelSource(
        name=name,
        cluster=cluster,
        alias=cluster if alone else "",
        seeds=_noted(cluster),
        rediscover=rediscover or (lambda: ask_ray(cluster)),
    )


def _noted(cluster: str) -> ClusterAddresses:
    up = found(cluster)
    return ClusterAddresses(
        routers=up.router_addresses, controller=up.controller_address, credentials=credentials_of(up)
    )


def _name_and_cluster(text: str) -> tuple[str, str]:
    name, separator, cluster = text.rpartition("=")
    if not (separator and name and cluster):
        raise ConfigError(f'model: got "{text}", expected NAME=CLUSTER, for example mixtral=moecluster')
    return name, cluster


class ServedCluster:
    """The cluster that `serve` brought up: if all of it is lost, it is brought up again, a limited number of times."""

    def __init__(
        self,
        cluster: str,
        arguments: Sequence[str],
        *,
        restarts: int,
        ending: Callable[[], bool],
    ) -> None:
        """arguments: of `up`. ending: returns whether the gateway, and so the cluster, is ending."""
        self._cluster = cluster
        self.command = (*SELF, "up", *arguments)
        self._restarts_left = restarts
        self._ending = ending

    def bring_up(self) -> int:
        """Returns the exit code of `moecluster up`, which prints its errors. If interrupted, leaves nothing behind."""
        # A session of its own: the terminal's signals do not reach it; we end it once, and let it clean up.
        with subprocess.Popen(self.command, start_new_session=True) as process:
            try:
                while not self._ending():  # `up` has timeouts of its own
                    with suppress(subprocess.TimeoutExpired):
                        return process.wait(ENDING_POLL_S)
                _end(process)
            except BaseException:
                _end(process)
                raise
        return process.returncode

    def find(self) -> ClusterAddresses:
        """Returns where the actors are. Raises Unavailable; ClusterEnded if they are lost and no restart is left."""
        try:
            return ask_ray(self._cluster)
        except ClusterEnded as exc:
            if not self._restarts_left or self._ending():
                raise
            self._restarts_left -= 1
            logger.error("%s; the cluster is brought up again, %d more times at most", exc, self._restarts_left)
            noted = cluster_file.load(self._cluster)
            if noted is not None:
                take_down(noted)
            if code := self.bring_up():
                raise ClusterEnded(f"{exc}; it could not be brought up again (exit code {code})") from exc
            return _noted(self._cluster)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(ENDING_TIMEOUT_S)
    process.kill()  # harmless if it has ended


def ask_ray(cluster: str) -> ClusterAddresses:
    """Returns where the actors of a cluster are now, asked in a process of its own, since joining Ray takes seconds.

    Raises Unavailable; ClusterEnded if nothing of the cluster comes back by itself.
    """
    command = [*SELF, "status", "--json", "--name", cluster, "--timeout-s", str(POLL_S)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STATUS_TIMEOUT_S, start_new_session=True)
        if done.returncode and not done.stdout:
            raise ClusterEnded(done.stderr.strip()[-300:].removeprefix("moecluster: "))
        status = json.loads(done.stdout)
        if status["status"] == "ended":
            raise ClusterEnded("; ".join(status["problems"]))
        addresses = {name: str(reached["address"]) for name, reached in status["actors"].items() if reached is not None}
        by_controller = (status["controller"] or {}).get("router_states", ())
        addresses = {router["router"]: str(router["address"]) for router in by_controller} | addresses
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise Unavailable(f"moecluster status: {type(exc).__name__}") from exc
    noted = cluster_file.load(cluster)
    return ClusterAddresses(
        routers=tuple(address for name, address in addresses.items() if is_router(name) and address),
        controller=addresses.get(CONTROLLER, ""),
        credentials=noted.read_credentials() if noted is not None and noted.secret_file else None,
    )
