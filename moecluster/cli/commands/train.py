"""train: runs training with a progress bar, and plots the loss curve."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actors import cluster_file
from actors.cluster_file import UpCluster
from actors.launch import bring_up, join, leave, take_down
from actors.training_host import RunGone
from moecluster.cli.common.extras import is_installed
from moecluster.cli.common.lookup import found
from moecluster.cli.common.model_target import check_places, read_target
from moecluster.cli.common.progress import loading_bar
from moecluster.config import Config, read_config
from moecluster.config.load import override
from moecluster.errors import DeadlineExceeded, ResourceError, StateLost, Unavailable
from moecluster.training.checkpoint_store import CHECKPOINTS, CheckpointStore
from moecluster.training.events import (
    AttemptFailed,
    BeganAgain,
    CheckpointFailed,
    CheckpointWritten,
    Evaluated,
    Event,
    StepDone,
    WentBack,
)
from moecluster.training.history import History
from moecluster.training.setup import prepare_start, read_data, run_tokenizer

if TYPE_CHECKING:
    from actors.driver import Cluster

POLL_S = 0.3
PATIENCE_S = 60.0  # at least, for a router that does not answer
CURVE = "loss.png"


def train(target: str, settings: Sequence[str], console: Console) -> None:
    """Trains to train.steps, in the running cluster or in one of its own."""
    config = read_target(target, settings)
    check_places(config)
    data = read_data(config, run_tokenizer(config))  # fails on bad data before anything is started
    for line in data.left_out:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    start = str(prepare_start(config).resolve())
    with _cluster(config, start, console) as up:
        last = run(config, start, join(up.name, up.ray_address, up.local_ray), console)
        leave()
        if last is not None:
            cluster_file.save(replace(up, model=last))
    console.print(f"trained; its checkpoints are in {config.train.output_dir}")
    if last is not None:
        console.print(f'next: moecluster generate {last} "PROMPT"', highlight=False)


def run(config: Config, start: str, cluster: "Cluster", console: Console) -> str | None:
    """Shows a run until it ends, and returns its last checkpoint, which the routers then serve.

    If its router's process is lost, the run restarts from its last checkpoint, at most train.max_restarts times.
    Raises the error that ended the run, if it failed.
    """
    History.open(config.train.output_dir)  # fails on an invalid history file before anything is trained
    last: str | None = None
    try:
        with _bar(console) as bar:
            task = bar.add_task("training", total=config.train.steps, figures="")
            for event in _all_events(config, start, cluster):
                if isinstance(event, StepDone):
                    bar.update(task, completed=event.step, figures=_figures(event))
                elif isinstance(event, CheckpointWritten):
                    last = str(Path(event.path).resolve())
                elif isinstance(event, BeganAgain):
                    last = event.checkpoint
                if (line := _line(event)) is not None:
                    bar.console.print(line, highlight=False)
    except BaseException:
        with suppress(Unavailable, DeadlineExceeded):  # the router is lost, and the run with it
            cluster.stop_training()
        raise
    if last is not None:
        cluster.reload_routers(last)
    _draw(History.open(config.train.output_dir), Path(config.train.output_dir) / CURVE, console)
    return last


def _all_events(config: Config, start: str, cluster: "Cluster") -> Iterator[Event]:
    """Yields the events of the run, and of its restarts from the last checkpoint when its router is lost."""
    output_dir = str(Path(config.train.output_dir).resolve())  # the router may have another working directory
    sent = read_config(override(config.to_tables(), {"train.output_dir": output_dir}))
    for restart in count(1):
        try:
            with suppress(Unavailable, DeadlineExceeded):  # then its next incarnation reports that it has no run
                cluster.train(sent, start)
            yield from _events(cluster, max(PATIENCE_S, config.cluster.start_timeout_s))
            return
        except RunGone as gone:
            if config.train.durability == "none":
                raise StateLost(f"{gone}; under train.durability = checkpoint it would begin again") from gone
            if restart > config.train.max_restarts:
                raise StateLost(
                    f"{gone}, more often than train.max_restarts = {config.train.max_restarts}; "
                    "with train.resume=true it goes on from its last checkpoint"
                ) from gone
            start = _last_checkpoint(config) or start
        yield BeganAgain(checkpoint=start, restart=restart, max_restarts=config.train.max_restarts)


def _last_checkpoint(config: Config) -> str | None:
    latest = CheckpointStore(Path(config.train.output_dir) / CHECKPOINTS).latest()
    return str(latest.resolve()) if latest is not None else None


@contextmanager
def _cluster(config: Config, start: str, console: Console) -> Iterator[UpCluster]:
    """Yields the running cluster, if it serves this run's model; else a new one, taken down in the end."""
    if cluster_file.load(config.cluster.name) is not None:
        up = found(config.cluster.name)
        checkpoints = str((Path(config.train.output_dir) / CHECKPOINTS).resolve())
        if up.model != start and str(Path(up.model).parent) != checkpoints:
            raise ResourceError(
                f"the cluster {up.name} is up and serves {up.model}, which is not of this run; "
                "take it down first (moecluster down), or choose another name: --set cluster.name=NAME"
            )
        yield up
        return
    console.print(f"no cluster {config.cluster.name} is up: starting one for this run (moecluster up keeps one)")
    with loading_bar(console, "starting the actors") as on_loading:
        up = bring_up(config, start, on_loading)
    try:
        yield up
    finally:
        take_down(up)


def _events(cluster: "Cluster", patience_s: float) -> Iterator[Event]:
    """Yields the run's events as they come, until it ends. Raises the error that ended it."""
    seen = 0
    silent_since_s: float | None = None
    while True:
        try:
            progress = cluster.training_progress(seen)
            silent_since_s = None
        except (Unavailable, DeadlineExceeded):
            # Ray restarts a lost router, and its new incarnation reports that the run is gone.
            silent_since_s = silent_since_s or time.monotonic()
            if time.monotonic() - silent_since_s > patience_s:
                raise
            time.sleep(POLL_S)
            continue
        seen += len(progress.events)
        yield from progress.events
        if progress.ended:
            if progress.error is not None:
                raise progress.error
            return
        time.sleep(POLL_S)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _figures(event: StepDone) -> str:
    """Formats cross-entropy, each auxiliary loss, throughput and balancedness."""
    auxiliary = [f"{kind} {loss:.4f}" for kind, loss in sorted((event.aux_losses or {}).items())]
    balance = [f"balancedness {event.balancedness:.2f}"] if event.balancedness is not None else []
    loss = f"cross-entropy {event.loss:.3f}"
    return "  ".join([loss, *auxiliary, f"{event.tokens_per_s:,.0f} tokens/s", *balance])


def _line(event: Event) -> str | None:
    """Returns the line printed for an event above the bar, or None."""
    match event:
        case Evaluated():
            domains = ", ".join(f"{name} {bits:.2f}" for name, bits in sorted(event.domains.items()))
            return f"step {event.step}: {event.bits_per_byte:.3f} bits per byte on validation text ({domains})"
        case CheckpointWritten():
            return f"step {event.step}: checkpoint {event.path} in {event.seconds:.1f} s"
        case CheckpointFailed():
            return f"step {event.step}: no checkpoint: {event.reason}"
        case AttemptFailed():
            return f"step {event.step}: attempt {event.attempt + 1} failed and is run again: {event.reason}"
        case BeganAgain():
            how_often = f"{event.restart} of at most {event.max_restarts} times"
            return f"the router was lost, and the run begins again from {event.checkpoint} ({how_often})"
        case WentBack():
            return f"step {event.from_step}: back to step {event.step} in {event.seconds:.1f} s: {event.reason}"
        case _:
            return None


def _draw(history: History, path: Path, console: Console) -> None:
    if not is_installed("matplotlib"):
        message = f"no picture of the loss: pip install 'moecluster[plots]' (the figures are in {history.path})"
        console.print(message, highlight=False, markup=False)
        return
    from moecluster.training.plots.loss_curve import draw_loss_curve  # needs matplotlib

    draw_loss_curve(history, path)
    console.print(f"loss curve: {path}")
