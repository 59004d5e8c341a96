"""demo: the main job from end to end: train, generate, see who serves what, kill an actor, and get the same text."""

import importlib.util
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actors.commands.target import read_target
from actors.commands.train import run as run_training
from actors.launch import bring_up, join, leave, take_down
from actors.state import UpCluster
from moecluster.client import Client
from moecluster.config import Config
from moecluster.errors import MoeClusterError, ResourceError
from moecluster.models.expert_source import ExpertSource
from moecluster.placement.initial import initial_placement
from moecluster.rpc.controller_client import controller_status
from moecluster.training.data import TextData
from moecluster.training.domain_map import Counts, domain_map, table_rows
from moecluster.training.history import History
from moecluster.training.start import prepare_start, read_data, run_tokenizer
from moecluster.types import ExpertId

PROMPT_TOKENS = 96
CONTINUATION_TOKENS = 160
KILL_AFTER_TOKENS = 40
MAP_PROMPTS = 6  # texts of each domain that are read for the map
MAP_PICTURE = "experts-by-domain.png"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A domain's prompt and what the model made of it."""

    domain: str
    prompt: str
    text: str


def demo(data: str | None, settings: Sequence[str], console: Console) -> None:
    """Runs all parts in a cluster of its own, which is gone afterwards; models and pictures stay in runs/."""
    config = read_target("demo", [f"train.output_dir={_fresh_folder()}", *settings, *_data_setting(data)])
    tokenizer = run_tokenizer(config)
    text = read_data(config, tokenizer)
    _head(console, 1, "The text")
    for domain in text.domains:
        console.print(f"  {domain.name}: {len(domain.train):,} tokens to train on, {len(domain.validation):,} to test")
    console.print(f"  knowing only how frequent each byte is costs {text.unigram_bits_per_byte:.2f} bits per byte")

    start = str(prepare_start(config).resolve())
    _head(console, 2, f"The cluster: {config.cluster.num_expert_actors} expert actors, a router, a controller")
    with console.status("starting"):
        up = bring_up(config, start)
    try:
        cluster = join(up.name, up.ray_address, up.local_ray)
        for name, endpoints in cluster.endpoints().items():
            console.print(f"  {name}: process {endpoints.pid if endpoints else 'unknown'}", highlight=False)

        _head(console, 3, f"Training: {config.train.steps} steps, every expert in its own actor")
        last = run_training(config, start, cluster, console)
        if last is None:
            raise MoeClusterError("the demo's training wrote no checkpoint")
        _judge(config, console)

        with Client(up.router_address) as client:
            _head(console, 4, "One continuation for each domain, through the cluster")
            samples = [_sample(client, text, domain.name, tokenizer.decode, console) for domain in text.domains]
            _head(console, 5, "Which experts serve which domain")
            busiest = _show_map(client, text, tokenizer.decode, config, last, console)
            _head(console, 6, f"The same text again, while {busiest} is killed")
            _kill_and_compare(client, samples[-1], busiest, cluster.endpoints()[busiest], up, console)
        leave()
    finally:
        take_down(up)
    _say_what_next(config, last, console)


def _fresh_folder() -> str:
    """runs/demo-1, or the first number that is free."""
    number = 1
    while Path(f"runs/demo-{number}").exists():
        number += 1
    return f"runs/demo-{number}"
