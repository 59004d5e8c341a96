"""Finds the weights that a command serves, refuses missing ones, and describes them."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from actors.cluster_file import UpCluster
from moecluster.cli.common.formatting import shown_time
from moecluster.config import Config
from moecluster.errors import CheckpointError, ConfigError, ResourceError
from moecluster.models.checkpoint.training_progress import TrainingState, read_training_state
from moecluster.training.checkpoint_store import CHECKPOINTS, CheckpointStore
from moecluster.training.latest_weights import is_untrained, latest_weights

RANDOM_WEIGHTS = "--random-weights"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What is known of a model directory's weights."""

    path: str
    step: int | None  # of training; None: the checkpoint does not record it
    written_s: float | None  # Unix time of the newest file; None: not visible from here

    def __str__(self) -> str:
        """Formats, such as /models/tiny (step 600, written 2026-01-31 12:00:00)."""
        steps = [] if self.step is None else ["untrained: random weights" if self.step == 0 else f"step {self.step}"]
        written = "not seen from here" if self.written_s is None else f"written {shown_time(self.written_s)}"
        return f"{self.path} ({', '.join([*steps, written])})"


def weights_in(model_dir: str) -> Weights:
    """Returns what is known of a directory's weights, as far as it is visible from here."""
    directory, written_s, state = Path(model_dir), None, None
    with suppress(OSError):
        files = [file for file in directory.iterdir() if file.suffix in (".safetensors", ".json")]
        written_s = max((file.stat().st_mtime for file in files), default=directory.stat().st_mtime)
    with suppress(OSError, CheckpointError):
        state = read_training_state(directory)
    return Weights(path=model_dir, step=None if state is None else state.step, written_s=written_s)


def trained_model(config: Config, target: str, command: str) -> str:
    """Returns the directory to serve: model.path, else the last checkpoint of train.output_dir.

    Raises CheckpointError if nothing is trained yet, suggesting commands instead. command: the one being run.
    """
    latest = latest_weights(config)
    if latest is None or is_untrained(config):
        raise CheckpointError(f"{target} has no weights: {_what_instead(config, target, command)}")
    return latest


def model_to_serve(config: Config, target: str, command: str, *, random_weights: bool) -> str:
    """Like trained_model; with random_weights it writes and returns a fresh model. Raises UserError."""
    if not random_weights:
        return trained_model(config, target, command)
    refuse_trained(config)
    # Imports transformers, which takes seconds that other commands need not wait for.
    from moecluster.training.setup import prepare_start

    return str(prepare_start(config).resolve())


def refuse_trained(config: Config) -> None:
    """Raises ConfigError if --random-weights would ignore existing trained weights."""
    latest = latest_weights(config)
    if latest is not None and not is_untrained(config):
        raise ConfigError(f"{RANDOM_WEIGHTS}: {latest} has weights; leave the option out, or set train.output_dir")


def refuse_another_model(cluster: UpCluster, config: Config, target: str) -> None:
    """Raises ResourceError if the running cluster serves anything but the target's weights."""
    latest = latest_weights(config)  # may be untrained, if `up` had --random-weights
    if cluster.model == latest:
        return
    wanted = latest or f"{target}, of which nothing is trained in {config.train.output_dir}"
    raise ResourceError(
        f"the cluster {cluster.name} is up and serves {cluster.model}, not {wanted}; "
        "take it down first (moecluster down), or choose another name: --set cluster.name=NAME"
    )


def _what_instead(config: Config, target: str, command: str) -> str:
    shown = f"nothing is trained in {config.train.output_dir} yet"
    ways = [f"train it with moecluster train {target}" + (" or moecluster demo" if target == "demo" else "")]
    newest = max(_runs_of(config), key=lambda path: weights_in(str(path)).written_s or 0.0, default=None)
    if newest is not None:
        prompt = ' "PROMPT"' if command == "generate" else ""
        ways.insert(0, f"take its newest run with moecluster {command} {newest}{prompt}")
    if command != "generate":
        ways.append(f"try it untrained with {RANDOM_WEIGHTS}")
    return f"{shown}; {', or '.join(ways)}"


def _runs_of(config: Config) -> Iterator[Path]:
    """Yields the last checkpoints of runs next to train.output_dir that trained a model with the same settings."""
    with suppress(OSError):
        for folder in sorted(Path(config.train.output_dir).parent.iterdir()):
            store = CheckpointStore(folder / CHECKPOINTS)
            steps = store.steps()
            if steps and steps[-1] > 0 and _is_of(config, store.path(steps[-1])):
                yield store.path(steps[-1])


def _is_of(config: Config, checkpoint: Path) -> bool:
    state: TrainingState | None = None
    with suppress(CheckpointError):
        state = read_training_state(checkpoint)
    model = json.loads(json.dumps(config.to_tables()["model"]))  # as stored in JSON: lists, not tuples
    return state is not None and all(state.settings.get(f"model.{key}") == value for key, value in model.items())
