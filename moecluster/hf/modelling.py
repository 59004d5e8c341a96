"""Model classes of transformers: built empty on the meta device, or with experts that never exist."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from moecluster.errors import CheckpointError, UnsupportedModelError
from moecluster.hf.interface import BACKEND_NAME, find_experts, moe_layers, register_backend, row_width

# While transformers builds or loads a model it replaces torch's init functions in the whole process. Two threads that
# do so at once can leave them replaced for good, and what is built later keeps the memory's garbage as its weights.
MODEL_BUILDING = threading.RLock()


def read_config(path: str | Path) -> PreTrainedConfig:
    """The configuration of a model directory. Raises CheckpointError or UnsupportedModelError."""
    if not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json: give the directory of a model")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except OSError as error:
        raise CheckpointError(f"config.json in {path} cannot be read: {_one_line(error)}") from error
    except (StrictDataclassError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(f"config.json in {path} cannot be used: {_one_line(error)}") from error
    return config


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The language model class of a configuration, causal before encoder-decoder.

    Raises UnsupportedModelError if the family has none.
    """
    mappings: list[Any] = [AutoModelForCausalLM._model_mapping, AutoModelForSeq2SeqLM._model_mapping]
    choice = next((found for mapping in mappings if (found := mapping.get(type(config), None))), None)
    if choice is None:
        raise UnsupportedModelError(
            f"a {config.model_type} model cannot be attached: transformers has no language model of this family"
        )
    candidates: list[type[PreTrainedModel]] = list(choice) if isinstance(choice, (list, tuple)) else [choice]
    named = [candidate for candidate in candidates if candidate.__name__ in (config.architectures or ())]
    return (named or candidates)[0]


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The whole model on the meta device: shapes without memory."""
    try:
        with MODEL_BUILDING, torch.device("meta"), no_init_weights():
            model = model_class(config)(config)
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"no {config.model_type} model can be built from this configuration: {_one_line(error)}"
        ) from error
    model.tie_weights()
    return model


class StoredTensor(Protocol):
    """A tensor of a checkpoint that is read when it is indexed: as much of safetensors' slices as transformers uses."""

    def __getitem__(self, whole: Any) -> torch.Tensor:
        """The tensor; `...` is all that is ever asked for."""


def load_without_experts(
    config: PreTrainedConfig, weights: Mapping[str, StoredTensor], directory: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, Any]:
    """The model with its trunk's weights, by checkpoint key, and transformers' loading report.

    Its experts modules hold no parameters, so that no byte of theirs is read. directory: has its generation config.
    """
    register_backend()
    trunk_class = _without_experts(model_class(config))
    with MODEL_BUILDING:
        loaded: Any = trunk_class.from_pretrained(
            None,
            state_dict=dict(weights),
            config=config,
            dtype=dtype,
            experts_implementation=BACKEND_NAME,
            ignore_mismatched_sizes=True,  # reported, so that the caller can name them in one line
            output_loading_info=True,
        )
    model, report = loaded
    if model.can_generate():
        model.generation_config = _generation_config(directory)
    return model, report


def _generation_config(directory: Path) -> GenerationConfig:
    """As transformers finds it: in its own file, else in the model's configuration."""
    try:
        return GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    except OSError:
        return GenerationConfig.from_pretrained(
            str(directory), config_file_name="config.json", local_files_only=True, _from_model_config=True
        )


def _without_experts(family: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass whose experts are taken out as soon as it is built (on the meta device, under from_pretrained)."""

    class Trunk(family):  # type: ignore[misc, valid-type]
        _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012  # the name and the list are transformers' own
            *(family._keys_to_ignore_on_load_unexpected or ()),
            r"(^|\.)experts\.",
        ]

        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            strip_experts(self)

    # transformers looks key conversions up by class name, and source-code heuristics by module.
    Trunk.__name__, Trunk.__qualname__, Trunk.__module__ = family.__name__, family.__qualname__, family.__module__
    return Trunk


def strip_experts(model: nn.Module) -> None:
    """Takes every expert's parameters out of a model; its experts modules remember the width of their rows."""
    moe_layers(model)  # refuse a family that would go on with its own experts
    for _, _, module in find_experts(model):
        module.__dict__["moecluster_width"] = row_width(module)
        for name in module._parameters:
            module._parameters[name] = None
        for name, child in list(module.named_children()):
            if any(True for _ in child.parameters()):
                del module._modules[name]
        module.__dict__["_is_hf_initialized"] = True  # or transformers initializes what is not there


def keep_one_expert(model: nn.Module) -> None:
    """Cuts the fused parameters of an empty model to one expert, the shape that one expert's rows convert to."""
    for _, _, module in find_experts(model):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter[:1]))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"unknown {text}" if isinstance(error, KeyError) else text
