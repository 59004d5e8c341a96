"""generate: streams a model's output to the terminal."""

from collections.abc import Sequence

from rich.console import Console

from actors import cluster_file
from actors.launch import bring_up, credentials_of, take_down
from moecluster.cli.common.cluster_choice import ClusterChoice, RemoteCluster, routers_in
from moecluster.cli.common.lookup import found
from moecluster.cli.common.model_target import read_target
from moecluster.cli.common.model_weights import refuse_another_model, trained_model, weights_in
from moecluster.cli.common.progress import loading_bar
from moecluster.cli.common.routers import find_routers
from moecluster.client import Client, GenerationOptions
from moecluster.config import read_config
from moecluster.config.load import override, parse_override
from moecluster.config.sections import ServeConfig
from moecluster.errors import ConfigError, InvalidMessage


def generate(
    target: str, prompt: str, chat: bool, options: GenerationOptions, settings: Sequence[str], console: Console
) -> None:
    """Writes the prompt's continuation to standard output; everything else goes to the console (standard error).

    chat: the prompt is a user's message, to be answered. options: those given by the user; max_new_tokens, temperature,
    top_p and seed default to the configuration's.
    """
    config = read_target(target, settings)
    asked = with_defaults(options, config.serve)
    if cluster_file.load(config.cluster.name) is not None:
        cluster = found(config.cluster.name)
        refuse_another_model(cluster, config, target)
        if (weights := weights_in(cluster.model)).step == 0:
            console.print(f"the model is {weights}", highlight=False, markup=False, soft_wrap=True)
        _write(
            Client(
                cluster.router_addresses,
                discover=lambda: find_routers(cluster, console),
                credentials=credentials_of(cluster),
            ),
            prompt,
            chat,
            asked,
            console,
        )
        return
    model_dir = trained_model(config, target, "generate")
    with loading_bar(console, f"no cluster {config.cluster.name} is up: starting one for this request") as on_loading:
        cluster = bring_up(config, model_dir, on_loading)
    console.print("started a cluster for this request alone (moecluster up keeps one)")
    try:
        _write(Client(cluster.router_addresses, credentials=credentials_of(cluster)), prompt, chat, asked, console)
    finally:
        take_down(cluster)


def generate_at(
    choice: ClusterChoice,
    prompt: str,
    chat: bool,
    options: GenerationOptions,
    settings: Sequence[str],
    console: Console,
) -> None:
    """Like generate, on the cluster at an address, whatever it serves."""
    config = read_config(override({}, dict(parse_override(text) for text in settings)))
    cluster = RemoteCluster(choice)
    routers = routers_in(cluster.status())
    client = Client(routers, discover=cluster.router_addresses, credentials=cluster.credentials)
    _write(client, prompt, chat, with_defaults(options, config.serve), console)


def words_of(choice: ClusterChoice, target: str, prompt: str | None) -> tuple[str, str]:
    """Returns target and prompt of the command's words; a cluster at an address has no target. Raises ConfigError."""
    if choice.address and prompt is not None:
        raise ConfigError(f"TARGET: got {target} beside --address, expected PROMPT alone: the cluster serves its model")
    if not choice.address and prompt is None:
        raise ConfigError("PROMPT: missing; expected TARGET PROMPT, or --address HOST:PORT PROMPT")
    found = target if prompt is None else prompt
    if not found:
        raise ConfigError('PROMPT: got an empty prompt, expected text to continue, for example "def main("')
    return target, found


def with_defaults(options: GenerationOptions, serve: ServeConfig) -> GenerationOptions:
    """The options, with those of the configuration where none was given."""
    return {
        "max_new_tokens": serve.max_new_tokens,
        "temperature": serve.temperature,
        "top_p": serve.top_p,
        "seed": serve.seed,
        **options,
    }


def given_options(
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: Sequence[str] | None,
) -> GenerationOptions:
    """Returns the options given on the command line; None: not given."""
    options: GenerationOptions = {}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    if temperature is not None:
        options["temperature"] = temperature
    if top_p is not None:
        options["top_p"] = top_p
    if top_k is not None:
        options["top_k"] = top_k
    if seed is not None:
        options["seed"] = seed
    if stop is not None:
        options["stop"] = stop
    return options


def _write(client: Client, prompt: str, chat: bool, options: GenerationOptions, console: Console) -> None:
    with client:
        try:
            text = (
                client.chat([{"role": "user", "content": prompt}], **options)
                if chat
                else client.generate(prompt, **options)
            )
            for chunk in text:
                print(chunk.text, end="", flush=True)
        except InvalidMessage as exc:
            raise ConfigError(str(exc)) from exc
    print(flush=True)
    console.print(f"{len(text.ids)} tokens after a prompt of {text.prompt_tokens}, ended by: {text.finish_reason}")
