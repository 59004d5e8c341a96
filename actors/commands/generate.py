"""generate: a text from a model, streamed to the terminal as it comes."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from actors import state
from actors.commands.cluster import found, serves
from actors.commands.loading_bar import loading_bar
from actors.commands.target import read_target, trained_model
from actors.launch import bring_up, join, leave, take_down
from actors.state import UpCluster
from moecluster.client import FailoverStream
from moecluster.config import Config
from moecluster.errors import ConfigError, InvalidMessage, Unavailable

if TYPE_CHECKING:
    from actors.driver import Cluster

PATIENCE_S = 60.0  # a router's process imports torch and transformers, and loads the trunk
RETRY_S = 0.5


def generate(target: str, prompt: str, max_new_tokens: int, settings: Sequence[str], console: Console) -> None:
    """Writes the prompt's continuation to standard output; everything else goes to the console (standard error)."""
    if not prompt:
        raise ConfigError('PROMPT: got an empty text, expected something to go on from, for example "def main("')
    config = read_target(target, settings)
    model_dir = trained_model(config)
    if state.load(config.cluster.name) is not None:
        cluster = found(config.cluster.name)
        serves(cluster, model_dir)
        _stream(_routers(cluster, console), prompt, max_new_tokens, config, console)
        return
    with loading_bar(console, f"no cluster {config.cluster.name} is up: starting one for this text") as on_loading:
        cluster = bring_up(config, model_dir, on_loading)
    console.print("started a cluster for this text alone (moecluster up keeps one)")
    try:
        _stream(cluster.router_addresses, prompt, max_new_tokens, config, console)
    finally:
        take_down(cluster)


def _stream(addresses: Iterable[str], prompt: str, max_new_tokens: int, config: Config, console: Console) -> None:
    serve = config.serve
    text = FailoverStream(
        addresses,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=serve.temperature,
        top_p=serve.top_p,
        seed=serve.seed,
    )
    try:
        for piece in text:
            print(piece, end="", flush=True)
    except InvalidMessage as exc:
        raise ConfigError(str(exc)) from exc
    print(flush=True)
    done = text.stream
    assert done is not None, "a text that has ended was begun"
    console.print(f"{len(done.ids)} tokens after a prompt of {done.prompt_tokens}, ended by: {done.finish_reason}")


def _routers(cluster: UpCluster, console: Console) -> Iterator[str]:
    """Addresses of the routers: as they were noted, then, since joining Ray takes seconds, as Ray finds them now."""
    yield from cluster.router_addresses
    console.print("no router answers where it was; asking Ray where they are now")
    joined = join(cluster.name, cluster.ray_address, cluster.local_ray)
    try:
        addresses = _wait_for_routers(joined)
    finally:
        leave()
    noted = state.load(cluster.name)
    if noted is not None:  # else it was taken down meanwhile
        state.save(replace(noted, router_addresses=addresses))
    yield from addresses


def _wait_for_routers(cluster: "Cluster") -> tuple[str, ...]:
    """Ray starts a router that was lost again. Raises Unavailable if none is back in time."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return cluster.router_addresses()
        except Unavailable:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(RETRY_S)
