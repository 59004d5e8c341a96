"""Whether a model directory can be served, as far as that shows before anything is started."""

from pathlib import Path

from moecluster.hf.modelling import read_generation_config
from moecluster.models.config import read_loadable_config
from moecluster.models.experts.source import ExpertSource
from moecluster.models.tokenizer.load import load_tokenizer


def refuse_unusable(directory: str | Path) -> None:
    """Reads headers, configuration and tokenizer. Raises CheckpointError or UnsupportedModelError, in one line."""
    ExpertSource(directory)
    read_loadable_config(directory)
    read_generation_config(Path(directory))
    load_tokenizer(directory)
