"""The paths of a run, which is configured in one working directory and carried out in another."""

import os
from dataclasses import replace
from pathlib import Path

from moecluster.config import Config
from moecluster.errors import ConfigError
from moecluster.training.corpus import STDLIB


def with_absolute_paths(config: Config) -> Config:
    """Returns the configuration with all paths of a run absolute, as this process sees them."""
    train = config.train
    return replace(
        config,
        model=replace(config.model, path=_absolute(config.model.path)),
        train=replace(
            train,
            output_dir=str(Path(train.output_dir).resolve()),
            data=train.data if train.data == STDLIB else _absolute(train.data),
            tokenizer=_absolute(train.tokenizer),
        ),
    )


def run_paths(config: Config, start: str = "") -> tuple[str, ...]:
    """Returns what a run reads and writes. start: the checkpoint that it begins from, if it is known.

    Raises ConfigError for a path that depends on the working directory.
    """
    named = {
        "start": start,
        "model.path": config.model.path,
        "train.output_dir": config.train.output_dir,
        "train.data": "" if config.train.data == STDLIB else config.train.data,
        "train.tokenizer": config.train.tokenizer,
    }
    for name, path in named.items():
        if path and not os.path.isabs(path):
            raise ConfigError(f"{name}: got {path}, expected an absolute path, as the first router's node sees it")
    return tuple(path for path in named.values() if path)


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else ""
