"""Which weights settings lead to: the model that they name, or the last checkpoint of their run."""

from pathlib import Path

from moecluster.config import Config
from moecluster.training.checkpoint_store import CHECKPOINTS, CheckpointStore


def latest_weights(config: Config) -> str | None:
    """Returns model.path, else the last checkpoint of train.output_dir, which may be a fresh model; None if there is
    neither."""
    if config.model.path:
        return str(Path(config.model.path).resolve())
    latest = CheckpointStore(Path(config.train.output_dir) / CHECKPOINTS).latest()
    return str(latest.resolve()) if latest is not None else None


def is_untrained(config: Config) -> bool:
    """Returns whether there is at most a fresh model, written by --random-weights or at the start of a run."""
    if config.model.path:
        return False
    steps = CheckpointStore(Path(config.train.output_dir) / CHECKPOINTS).steps()
    return not steps or steps[-1] == 0
