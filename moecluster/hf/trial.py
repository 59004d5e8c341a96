"""Trial runs of a model that leave it unchanged."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel


@contextmanager
def left_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Restores the attributes of the model, its modules and its configs on exit: attention implementation, hooks,
    training mode, and no cache manager."""
    kept = [(module, dict(vars(module))) for module in model.modules()]
    hooks = [(hooked, dict(hooked)) for module, _ in kept for hooked in _hooks(module)]
    configs = [(config, dict(vars(config))) for config in _configs(model)]
    generation = copy.deepcopy(model.generation_config)
    try:
        yield
    finally:
        for owner, attributes in (*kept, *configs):
            _set_back(vars(owner), attributes)
        for hooked, before in hooks:
            _set_back(hooked, before)
        model.generation_config = generation


def without_generation_settings(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy, sharing modules and weights, whose generate() uses only the settings passed to it.

    generate() fills every setting that is None from the model's generation_config, and for most settings None is how to
    turn them off.
    """
    bare = copy.copy(model)
    bare.generation_config = GenerationConfig()
    return bare


def _set_back(attributes: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    for name in attributes.keys() - before.keys():
        del attributes[name]
    attributes.update(before)


def _hooks(module: nn.Module) -> list[dict[Any, Any]]:
    return [value for name, value in vars(module).items() if name.endswith("_hooks") and isinstance(value, dict)]


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Returns every config of the model and its modules, nested ones included, once each."""
    found: dict[int, PreTrainedConfig] = {}

    def note(config: object) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for value in vars(config).values():
                note(value)

    for module in model.modules():
        note(getattr(module, "config", None))
    return list(found.values())
