"""generate: a text from a model, streamed to the terminal as it comes."""

from collections.abc import Sequence

from rich.console import Console

from actors import state
from actors.commands.cluster import found, serves
from actors.commands.target import read_target, trained_model
from actors.launch import bring_up, take_down
from moecluster.client import Client
from moecluster.config import Config
from moecluster.errors import ConfigError, InvalidMessage


def generate(target: str, prompt: str, max_new_tokens: int, settings: Sequence[str], console: Console) -> None:
    """Writes the prompt's continuation to standard output; everything else goes to the console (standard error)."""
    if not prompt:
        raise ConfigError('PROMPT: got an empty text, expected something to go on from, for example "def main("')
    config = read_target(target, settings)
    model_dir = trained_model(config)
    if state.load(config.cluster.name) is not None:
        cluster = found(config.cluster.name)
        serves(cluster, model_dir)
        _stream(cluster.router_address, prompt, max_new_tokens, config, console)
        return
    with console.status(f"no cluster {config.cluster.name} is up: starting one for this text"):
        cluster = bring_up(config, model_dir)
    console.print("started a cluster for this text alone (moecluster up keeps one)")
    try:
        _stream(cluster.router_address, prompt, max_new_tokens, config, console)
    finally:
        take_down(cluster)


def _stream(address: str, prompt: str, max_new_tokens: int, config: Config, console: Console) -> None:
    serve = config.serve
    with Client(address) as client:
        stream = client.generate(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=serve.temperature,
            top_p=serve.top_p,
            seed=serve.seed,
        )
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        except InvalidMessage as exc:
            raise ConfigError(str(exc)) from exc
    print(flush=True)
    console.print(
        f"{len(stream.ids)} tokens after a prompt of {stream.prompt_tokens}, ended by: {stream.finish_reason}"
    )
