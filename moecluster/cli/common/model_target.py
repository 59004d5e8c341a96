"""Reads a command's target: a model directory, a TOML file, or the name of a preset."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors import cluster_file
from actors.places import check_folder
from moecluster.cli.common.ray_job import RayJob, current_job, kept_path
from moecluster.config import Config, load_config, read_config
from moecluster.config.load import override, parse_override, preset_names
from moecluster.errors import ConfigError


def read_target(target: str, settings: Sequence[str]) -> Config:
    """Returns the configuration of a target; settings are overrides such as train.steps=100. Raises ConfigError.

    Always sets serve.model_name: the model's name for HTTP clients, and the label `model` of all metrics. Inside a Ray
    job, cluster.address is by default the job's Ray, and a relative train.output_dir lies below the home directory.
    """
    config = in_job(_read_target(target, dict(parse_override(text) for text in settings)), current_job())
    if config.serve.model_name:
        return config
    return replace(config, serve=replace(config.serve, model_name=model_name(target)))


def _read_target(target: str, overrides: Mapping[str, Any]) -> Config:
    if os.path.isdir(target):  # unlike Path.is_dir, returns False for any invalid string
        return read_config(override({"model": {"path": target}}, overrides), source=target)
    if not os.path.isfile(target) and target not in preset_names():
        raise ConfigError(
            f'"{target}": no such model directory, TOML file or preset; the presets are {", ".join(preset_names())}'
        )
    return load_config(target, overrides)


def in_job(config: Config, job: RayJob | None) -> Config:
    """Returns the configuration with the defaults of a Ray job; unchanged outside of jobs."""
    if job is None:
        return config
    cluster = replace(config.cluster, address=config.cluster.address or job.ray_address)
    output_dir = str(kept_path(config.train.output_dir, job))
    return replace(config, cluster=cluster, train=replace(config.train, output_dir=output_dir))


def model_name(target: str) -> str:
    """Returns the default served name of a model: the name that the user gave its directory, or its file's stem.

    A snapshot in a download cache (models--ORG--NAME/snapshots/HASH, or without ORG) has its model's name.
    """
    path = Path(os.path.abspath(target))  # keeps the name of a symbolic link
    if not os.path.isdir(target):
        return path.stem
    cached = path.parent.parent.name
    if path.parent.name == "snapshots" and cached.startswith("models--"):
        name = cached.removeprefix("models--")
        return name.partition("--")[2] or name
    return path.name


def check_places(config: Config) -> None:
    """Raises UserError if a run could not write its files, before any work is spent on it."""
    cluster_file.check()
    check_folder("train.output_dir", config.train.output_dir)
