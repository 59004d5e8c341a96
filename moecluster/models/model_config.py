"""Reading the configuration of a model directory, our own family included."""

from pathlib import Path

from transformers import PreTrainedConfig

from moecluster.errors import UnsupportedModelError
from moecluster.hf.modelling import read_config
from moecluster.models.own_build import register_own_family


def read_model_config(path: str | Path) -> PreTrainedConfig:
    """Raises CheckpointError if there is no config.json, UnsupportedModelError if no known family is in it."""
    register_own_family()
    return read_config(path)


def read_loadable_config(path: str | Path) -> PreTrainedConfig:
    """The same, for a model whose weights shall be read: quantized ones cannot be yet."""
    config = read_model_config(path)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{path} is quantized: give a checkpoint in float32, float16 or bfloat16")
    return config
