"""Checks, before anything is started, whether a model directory can be served."""

from pathlib import Path

from moecluster.hf.modelling import read_generation_config
from moecluster.models.config import read_loadable_config
from moecluster.models.experts.source import ExpertSource
from moecluster.models.tokenizer.load import load_tokenizer


def refuse_unusable(directory: str | Path) -> None:
    """Reads headers, configs and tokenizer. Raises CheckpointError or UnsupportedModelError, in one line."""
    ExpertSource(directory)
    read_loadable_config(directory)
    read_generation_config(Path(directory))
    load_tokenizer(directory)
