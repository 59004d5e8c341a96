"""train: runs training with a progress bar, and plots the loss curve."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actors import cluster_file
from actors.cluster_file import UpCluster
from actors.launch import bring_up, credentials_of, join, leave, take_down
from moecluster.cli.common.cluster_choice import ClusterChoice, RemoteCluster
from moecluster.cli.common.extras import is_installed
from moecluster.cli.common.lookup import found
from moecluster.cli.common.model_target import check_places, read_target
from moecluster.cli.common.progress import loading_bar
from moecluster.config import Config
from moecluster.errors import DeadlineExceeded, ResourceError, StateLost, Unavailable
from moecluster.placement.departures import number_of
from moecluster.rpc.credentials import ClusterCredentials
from moecluster.rpc.router.training_messages import RunGone, RunProgress
from moecluster.rpc.router.training_run import TrainingRun
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
    decode_event,
)
from moecluster.training.history import History
from moecluster.training.run_paths import run_paths, with_absolute_paths
from moecluster.training.setup import prepare_start, read_data, run_tokenizer

if TYPE_CHECKING:
    from actors.driver import Cluster

POLL_S = 0.3
PATIENCE_S = 60.0  # at least, for a router that does not answer
CURVE = "loss.png"
LAST = "its last checkpoint"


class Training(Protocol):
    """Training runs in a cluster's first router, as TrainingRun asks for them."""

    def start(self, settings: Mapping[str, Any], start: str) -> None: ...
    def progress(self, since: int) -> RunProgress: ...
    def stop(self) -> None: ...
    def reload(self, checkpoint: str) -> None: ...


def train(target: str, settings: Sequence[str], console: Console) -> None:
    """Trains to train.steps, in the running cluster or in one of its own."""
    config = with_absolute_paths(read_target(target, settings))
    check_places(config)
    data = read_data(config, run_tokenizer(config))  # fails on bad data before anything is started
    for line in data.left_out:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    start = str(prepare_start(config).resolve())
    with _cluster(config, start, console) as up:
        last = run_in(join(up.name, up.ray_address, up.local_ray), config, start, credentials_of(up), console)
        leave()
        if last is not None:
            cluster_file.save(replace(up, model=last))
    console.print(f"trained; its checkpoints are in {config.train.output_dir}")
    if last is not None:
        console.print(f'next: moecluster generate {last} "PROMPT"', highlight=False)


def train_at(choice: ClusterChoice, target: str, settings: Sequence[str], console: Console) -> None:
    """Trains to train.steps in the cluster at an address: its first router reads the text and writes the checkpoints,
    under paths of its node that the cluster was given."""
    config = read_target(target, settings)
    run_paths(config)  # fails on a relative path
    cluster = RemoteCluster(choice)

    def first() -> str:
        states = {state.router: state.address for state in cluster.status().router_states}
        router = min(states, key=number_of, default="")  # the one called "router", unless its node had to go
        if not states.get(router):
            raise Unavailable(f"the first router of {choice} has no address now; it may be starting again")
        return states[router]

    training = TrainingRun(find_first=first, find_all=cluster.router_addresses, credentials=cluster.credentials)
    last = run(config, "", training, console)
    console.print(f"trained; its checkpoints are in {config.train.output_dir} of the first router's node")
    if last is not None:
        console.print(f'next: moecluster generate --address {choice.address} "PROMPT"', highlight=False)


def run_in(
    cluster: "Cluster", config: Config, start: str, credentials: ClusterCredentials | None, console: Console
) -> str | None:
    """Like run, in a cluster whose Ray this process has joined, and draws the loss curve. config: with absolute
    paths."""
    History.open(config.train.output_dir)  # fails on an invalid history file before anything is trained
    for path in run_paths(config, start):
        cluster.give_directory(path)
    last = run(config, start, cluster.training(credentials), console)
    _draw(History.open(config.train.output_dir), Path(config.train.output_dir) / CURVE, console)
    return last


def run(config: Config, start: str, training: Training, console: Console) -> str | None:
    """Shows a run until it ends, and returns its last checkpoint, which the routers then serve.

    start: the checkpoint to begin from; empty: the router chooses. If its router's process is lost, the run restarts
    from its last checkpoint, at most train.max_restarts times. Raises the error that ended the run, if it failed.
    """
    last: str | None = None
    try:
        with _bar(console) as bar:
            task = bar.add_task("training", total=config.train.steps, figures="")
            for event in _all_events(config, start, training):
                if isinstance(event, StepDone):
                    bar.update(task, completed=event.step, figures=_figures(event))
                elif isinstance(event, CheckpointWritten):
                    last = event.path
                elif isinstance(event, BeganAgain):
                    last = event.checkpoint or last
                if (line := _line(event)) is not None:
                    bar.console.print(line, highlight=False)
    except BaseException:
        with suppress(Unavailable, DeadlineExceeded):  # the router is lost, and the run with it
            training.stop()
        raise
    if last is not None:
        training.reload(last)
    return last


def _all_events(config: Config, start: str, training: Training) -> Iterator[Event]:
    """Yields the events of the run, and of its restarts from the last checkpoint when its router is lost."""
    chosen_here = bool(start)
    for restart in count(1):
        try:
            with suppress(Unavailable, DeadlineExceeded):  # then its next incarnation reports that it has no run
                training.start(config.to_tables(), start)
            yield from _events(training, max(PATIENCE_S, config.cluster.start_timeout_s))
            return
        except RunGone as gone:
            if config.train.durability == "none":
                raise StateLost(f"{gone}; under train.durability = checkpoint it would begin again") from gone
            if restart > config.train.max_restarts:
                raise StateLost(
                    f"{gone}, more often than train.max_restarts = {config.train.max_restarts}; "
                    "with train.resume=true it goes on from its last checkpoint"
                ) from gone
            if chosen_here:
                start = _last_checkpoint(config) or start
            else:
                config = replace(config, train=replace(config.train, resume=True))
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


def _events(training: Training, patience_s: float) -> Iterator[Event]:
    """Yields the run's events as they come, until it ends. Raises the error that ended it."""
    seen = 0
    silent_since_s: float | None = None
    while True:
        try:
            progress = training.progress(seen)
            silent_since_s = None
        except (Unavailable, DeadlineExceeded):
            # Ray restarts a lost router, and its new incarnation reports that the run is gone.
            silent_since_s = silent_since_s or time.monotonic()
            if time.monotonic() - silent_since_s > patience_s:
                raise
            time.sleep(POLL_S)
            continue
        seen += len(progress.events)
        yield from map(decode_event, progress.events)
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
            return f"the router was lost, and the run begins again from {event.checkpoint or LAST} ({how_often})"
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
