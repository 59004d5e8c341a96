"""Builds transformers models empty on the meta device, or without their experts."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
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
from moecluster.hf.foreign import one_line, read_object, reading
from moecluster.hf.interface import (
    BACKEND_NAME,
    find_experts,
    moe_layers,
    refuse_unattachable,
    register_backend,
    row_width,
)

GENERATION_CONFIG = "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NUMBERS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "max_length",
    "max_new_tokens", "min_length", "min_new_tokens",
)  # fmt: skip

# While it builds or loads a model, transformers replaces torch's init functions in the whole process. Two threads doing
# so at once can leave them replaced for good; models built later then keep uninitialized memory as weights.
MODEL_BUILDING = threading.RLock()


def read_config(path: str | Path) -> PreTrainedConfig:
    """Returns the config of a model directory. Raises CheckpointError or UnsupportedModelError."""
    file = Path(path) / "config.json"
    read_object(file, "give the directory of a model, with the config.json that save_pretrained wrote")
    with reading(
        file, "give a model of a family that the installed transformers knows, unchanged", error=UnsupportedModelError
    ):
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    return text_config(config)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the language model's config of a multimodal model if AutoModelForCausalLM takes it, else the config."""
    choice = AutoModelForCausalLM._model_mapping.get(type(config), None)
    classes = choice if isinstance(choice, (list, tuple)) else [choice]
    own = [
        found for found in classes if found is not None and found.config_class is config.sub_configs.get("text_config")
    ]
    return config.get_text_config() if own else config


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Returns the language model class of a config, preferring causal over encoder-decoder.

    Raises UnsupportedModelError if the family has none.
    """
    mappings: list[Any] = [AutoModelForCausalLM._model_mapping, AutoModelForSeq2SeqLM._model_mapping]
    choice = next((found for mapping in mappings if (found := mapping.get(type(config), None))), None)
    if choice is None:
        raise UnsupportedModelError(f"a {config.model_type} model cannot be attached: {_why_no_class(config)}")
    candidates: list[type[PreTrainedModel]] = list(choice) if isinstance(choice, (list, tuple)) else [choice]
    named = [candidate for candidate in candidates if candidate.__name__ in (config.architectures or ())]
    return (named or candidates)[0]


def _why_no_class(config: PreTrainedConfig) -> str:
    if config.get_text_config() is config and not config.sub_configs:
        return "transformers has no language model of this family"
    return (
        "it is made of several models, and transformers' AutoModelForCausalLM takes no language model out of it; "
        "give a language model alone"
    )


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Returns the whole model on the meta device: shapes without memory. Raises UnsupportedModelError."""
    try:
        with MODEL_BUILDING, torch.device("meta"), no_init_weights():
            model = model_class(config)(config)
        model.tie_weights()
    except UnsupportedModelError:
        raise
    except Exception as error:  # a family's code may raise anything on a user's config
        raise UnsupportedModelError(
            f"no {config.model_type} model can be built from this configuration: {one_line(error)}"
        ) from error
    return model


class StoredTensor(Protocol):
    """A checkpoint tensor that is read when indexed: the part of safetensors' slice API that transformers uses."""

    def __getitem__(self, whole: Any) -> torch.Tensor:
        """Returns the whole tensor. transformers only ever passes `...`."""


def load_without_experts(
    config: PreTrainedConfig, weights: Mapping[str, StoredTensor], directory: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, Any]:
    """Returns the model with its trunk's weights, and transformers' loading report. weights: by checkpoint key.

    The experts modules hold no parameters, so that no expert bytes are read. directory: has the generation config.
    """
    register_backend()
    refuse_unattachable(config.model_type)
    trunk_class = _without_experts(model_class(config))
    with MODEL_BUILDING, reading(directory, "give the whole directory that save_pretrained wrote"):
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
        model.generation_config = read_generation_config(directory)
    return model, report


def read_generation_config(directory: Path) -> GenerationConfig:
    """Reads the generation config as transformers does: from its own file, else from config.json. Raises
    CheckpointError."""
    file = directory / GENERATION_CONFIG
    if not file.exists():
        with reading(directory / "config.json", "its generation settings do not fit transformers"):
            return GenerationConfig.from_pretrained(
                str(directory), config_file_name="config.json", local_files_only=True, _from_model_config=True
            )
    content = read_object(file, "copy it again, or remove it")
    for name in _TOKEN_IDS:
        value = content.get(name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(id) is int for id in ids):
            raise CheckpointError(f"{file} cannot be used: {name} is {value!r}; give a token id")
    for name in _NUMBERS:
        value = content.get(name)
        if value is not None and type(value) not in (int, float):
            raise CheckpointError(f"{file} cannot be used: {name} is {value!r}; give a number")
    with reading(file, "copy it again, or remove it"):
        return GenerationConfig.from_pretrained(str(directory), local_files_only=True)


def _without_experts(family: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Returns a subclass that strips its experts once built (on the meta device, under from_pretrained)."""

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
    """Removes all expert parameters from a model. The experts modules keep the width of their rows."""
    moe_layers(model)  # refuses a family that would run its own experts
    for _, _, module in find_experts(model):
        module.__dict__["moecluster_width"] = row_width(module)
        for name in module._parameters:
            module._parameters[name] = None
        for name, child in list(module.named_children()):
            if any(True for _ in child.parameters()):
                del module._modules[name]
        module.__dict__["_is_hf_initialized"] = True  # or transformers would initialize the missing parameters


def keep_one_expert(model: nn.Module) -> None:
    """Cuts the fused parameters of an empty model to a single expert, as `convert_rows` needs."""
    for _, _, module in find_experts(model):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter[:1]))
