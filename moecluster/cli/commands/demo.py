"""demo: trains, generates, shows which experts serve what, kills an actor, and gets the same output again."""

import os
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from actors.launch import bring_up, credentials_of, join, leave, take_down
from actors.names import expert_names
from moecluster.cli.commands.train import run_in
from moecluster.cli.common.extras import is_installed
from moecluster.cli.common.model_target import check_places, read_target
from moecluster.cli.common.progress import loading_bar
from moecluster.cli.common.tables import make_table, show_table
from moecluster.client import Client, GenerationStream
from moecluster.config import Config
from moecluster.errors import MoeClusterError, Unavailable
from moecluster.models.experts.source import ExpertSource
from moecluster.placement.initial import initial_placement
from moecluster.training.data import TextData
from moecluster.training.domain_usage import Counts, domain_map, table_rows
from moecluster.training.history import History
from moecluster.training.run_paths import with_absolute_paths
from moecluster.training.setup import prepare_start, read_data, run_tokenizer
from moecluster.types import ExpertId

if TYPE_CHECKING:
    from actors.driver import Cluster

PROMPT_TOKENS = 96
CONTINUATION_TOKENS = 160
KILL_AFTER_TOKENS = 40
TEMPERATURE = 0.7  # sampling is keyed by seed and position, so the output can be reproduced exactly
SEED = 7
MAP_PROMPTS = 6  # prompts per domain for the map
MAP_PICTURE = "experts-by-domain.png"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A domain's prompt and the generated continuation."""

    domain: str
    prompt: str
    text: str


def demo(data: str | None, settings: Sequence[str], console: Console) -> None:
    """Runs all parts in a cluster of its own, which is taken down afterwards; models and plots stay in runs/."""
    config = with_absolute_paths(
        read_target("demo", [f"train.output_dir={_fresh_folder()}", *settings, *_data_setting(data)])
    )
    check_places(config)
    tokenizer = run_tokenizer(config)
    text = read_data(config, tokenizer)
    _head(console, 1, "The text")
    for line in text.left_out:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    for domain in text.domains:
        console.print(f"  {domain.name}: {len(domain.train):,} tokens to train on, {len(domain.validation):,} to test")
    console.print(f"  knowing only how frequent each byte is costs {text.unigram_bits_per_byte:.2f} bits per byte")

    start = str(prepare_start(config).resolve())
    _head(console, 2, f"The cluster: {config.cluster.num_expert_actors} expert actors, a router, a controller")
    with loading_bar(console, "starting") as on_loading:
        up = bring_up(config, start, on_loading)
    try:
        cluster = join(up.name, up.ray_address, up.local_ray)
        for name, endpoints in cluster.endpoints().items():
            console.print(f"  {name}: process {endpoints.pid if endpoints else 'unknown'}", highlight=False)

        _head(console, 3, f"Training: {config.train.steps} steps, every expert in its own actor")
        last = run_in(cluster, config, start, credentials_of(up), console)
        if last is None:
            raise MoeClusterError("the demo's training wrote no checkpoint")
        _judge(config, console)

        with Client(up.router_address, credentials=credentials_of(up)) as client:
            _head(console, 4, "One continuation for each domain, through the cluster")
            prompts = {d.name: _excerpts(text, tokenizer, d.name, PROMPT_TOKENS, count=1)[0] for d in text.domains}
            samples = [_sample(client, domain, prompt, console) for domain, prompt in prompts.items()]
            _head(console, 5, "Which experts serve which domain")
            read = {
                d.name: _excerpts(text, tokenizer, d.name, config.train.sequence_length, count=MAP_PROMPTS)
                for d in text.domains
            }
            busiest = _show_map(client, read, config, last, console)
            _head(console, 6, f"The same text again, while {busiest} is killed")
            _kill_and_compare(client, samples[-1], cluster, busiest, console)
        leave()
    finally:
        take_down(up)
    _show_next_steps(config, last, console)


def _fresh_folder() -> str:
    """Returns runs/demo-1, or the first unused number."""
    number = 1
    while Path(f"runs/demo-{number}").exists():
        number += 1
    return f"runs/demo-{number}"


def _data_setting(data: str | None) -> list[str]:
    return [f"train.data={data}"] if data else []


def _head(console: Console, number: int, title: str) -> None:
    console.print(f"\n[bold]{number}. {title}[/]", highlight=False)


def _judge(config: Config, console: Console) -> None:
    """Compares the last validation figure with the unigram entropy."""
    history = History.open(config.train.output_dir)
    assert history.started is not None and history.evaluations, "a run begins and ends with an evaluation"
    reached = history.evaluations[max(history.evaluations)].bits_per_byte
    unigram = history.started.unigram_bits_per_byte
    console.print(
        f"  {reached:.2f} bits per byte on text it never saw: {100 * reached / unigram:.0f} % of the unigram entropy"
    )


def _excerpts(
    text: TextData, tokenizer: PreTrainedTokenizerBase, domain: str, num_tokens: int, *, count: int
) -> list[str]:
    """Returns excerpts of a domain's validation text, each starting at a line start if there is one early enough."""
    chunks = []
    for window in text.validation_windows(count, domain):
        chunk = str(tokenizer.decode(window[:num_tokens])).strip("\ufffd")  # characters cut at the ends
        line_end = chunk.find("\n", 0, len(chunk) // 2)
        chunks.append(chunk[line_end + 1 :])
    return chunks


def _write_on(client: Client, prompt: str) -> GenerationStream:
    return client.generate(prompt, max_new_tokens=CONTINUATION_TOKENS, temperature=TEMPERATURE, seed=SEED)


def _sample(client: Client, domain: str, prompt: str, console: Console) -> Sample:
    written = _write_on(client, prompt).text()
    console.print(f"  [bold]{domain}[/]", highlight=False)
    console.print(f"[dim]{escape(prompt)}[/][green]{escape(written)}[/]\n", highlight=False)
    return Sample(domain=domain, prompt=prompt, text=written)


def _show_map(
    client: Client, read: Mapping[str, Sequence[str]], config: Config, model_dir: str, console: Console
) -> str:
    """Shows a table and a plot of which experts serve which domain; returns the last domain's busiest actor."""
    counts: dict[str, Counts] = {}
    for domain, prompts in read.items():
        total: Counter[ExpertId] = Counter()
        for prompt in prompts:
            stream = client.generate(prompt, max_new_tokens=1)
            stream.text()
            total.update(stream.experts)
        counts[domain] = total
    layer_experts = {layer.layer: layer.num_experts for layer in ExpertSource(model_dir).layers}
    replicas = initial_placement(config.controller.placement, layer_experts, expert_names(config))
    actors = {replica.expert: replica.actor for replica in replicas}
    shares = domain_map(counts, layer_experts)
    table = make_table("layer", "expert", "actor", *shares.domains, box=None, pad_edge=False)
    for row in table_rows(shares, actors):
        table.add_row(*row, end_section=row[1] == str(shares.num_experts - 1))
    show_table(table, console)
    if len(shares.domains) > 1:
        console.print(f"  two domains share all but {100 * shares.specialisation():.0f} % of their assignments")
    if not is_installed("matplotlib"):
        console.print("  no picture: pip install 'moecluster[plots]'", markup=False)
    else:
        from moecluster.training.plots.domain_usage import draw_domain_map  # needs matplotlib

        picture = Path(config.train.output_dir) / MAP_PICTURE
        draw_domain_map(shares, picture)
        console.print(f"  as a picture: {os.path.relpath(picture)}", highlight=False)
    served: Counter[str] = Counter()
    for expert, count in counts[shares.domains[-1]].items():
        served[actors[expert]] += count
    return served.most_common(1)[0][0]


def _kill_and_compare(client: Client, sample: Sample, cluster: "Cluster", victim: str, console: Console) -> None:
    """Generates a sample again, kills an actor's process meanwhile, and checks that the output is the same."""
    endpoints = cluster.endpoints()[victim]
    if endpoints is None:
        raise Unavailable(f"{victim} does not answer, so it cannot be shown how it is replaced")
    stream = _write_on(client, sample.prompt)
    chunks, longest_s, last_s, killed = [], 0.0, time.monotonic(), False
    for chunk in stream:
        chunks.append(chunk.text)
        longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
        if not killed and len(stream.ids) >= KILL_AFTER_TOKENS:
            os.kill(endpoints.pid, signal.SIGKILL)
            killed = True
            console.print(f"  {len(stream.ids)} tokens generated; process {endpoints.pid} of {victim} is killed")
    if not killed:
        raise MoeClusterError("the text ended before anything could be killed")
    again = "".join(chunks)
    after = cluster.endpoints()[victim]
    console.print(
        f"  the generation waited {longest_s:.1f} s at most, while {victim} came back"
        f" as process {after.pid if after else 'unknown'} and its experts were loaded again",
        highlight=False,
    )
    if again != sample.text:
        raise MoeClusterError(f"the text changed when {victim} was killed: {again!r} instead of {sample.text!r}")
    console.print(f"  [green]all {len(stream.ids)} tokens are the same[/]")


def _show_next_steps(config: Config, model_dir: str, console: Console) -> None:
    shown = os.path.relpath(model_dir)
    where = os.path.relpath(config.train.output_dir)
    console.print(f"\n[bold]Done.[/] Model, loss curve and map are in {where}.", highlight=False)
    console.print("What to try next:")
    for command, meaning in (
        (f'moecluster generate {shown} "import os"', "continue a prompt of yours"),
        (f"moecluster up {shown}", "keep a cluster that serves it; then status, generate, down"),
        (f"moecluster serve {shown} --model-name demo", "serve it over HTTP, as OpenAI does"),
        ("moecluster train switch --data PATH", "another system of the literature, on your text"),
        ("moecluster params deepseek-v3", "count parameters from a configuration alone"),
    ):
        console.print(f"  [bold]{escape(command)}[/]  {meaning}", highlight=False)
