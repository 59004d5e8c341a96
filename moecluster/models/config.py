"""Reads the config of a model directory, the native family included."""

from pathlib import Path

from transformers import PreTrainedConfig

from moecluster.hf.modelling import read_config
from moecluster.models.checkpoint.quantized import quantization_method
from moecluster.models.native.build import register_native_family


def read_model_config(path: str | Path) -> PreTrainedConfig:
    """Returns the config. Raises CheckpointError if there is no config.json, UnsupportedModelError if its family is
    unknown."""
    register_native_family()
    return read_config(path)


def read_loadable_config(path: str | Path) -> PreTrainedConfig:
    """Returns the config without its quantization, since weights are dequantized while they are read.

    Raises UnsupportedModelError for a quantization that cannot be dequantized.
    """
    config = read_model_config(path)
    if quantization_method(path, getattr(config, "quantization_config", None)) is not None:
        del config.quantization_config
    return config
