"""Reading the configuration of a model directory, our own family included."""

from pathlib import Path

from transformers import PreTrainedConfig

from moecluster.hf.modelling import read_config
from moecluster.models.checkpoint.quantized import quantization_method
from moecluster.models.native.build import register_own_family


def read_model_config(path: str | Path) -> PreTrainedConfig:
    """Raises CheckpointError if there is no config.json, UnsupportedModelError if no known family is in it."""
    register_own_family()
    return read_config(path)


def read_loadable_config(path: str | Path) -> PreTrainedConfig:
    """The same, of the model as it is once its weights are read: nothing of it is quantized any more.

    Raises UnsupportedModelError for a quantization that cannot be dequantised.
    """
    config = read_model_config(path)
    if quantization_method(path, getattr(config, "quantization_config", None)) is not None:
        del config.quantization_config
    return config
