"""The checkpoint keys and shapes of a model's experts, from its config alone, without weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from moecluster.hf.interface import moe_layers, refuse_unattachable
from moecluster.hf.keys import rows_to_checkpoint
from moecluster.hf.modelling import empty_model, keep_one_expert
from moecluster.models.native.build import register_native_family
from moecluster.types import ExpertId, MoeLayer


class ExpertLayout:
    """The experts of a config, on the meta device. Built once; lookups are cheap."""

    def __init__(self, config: PreTrainedConfig) -> None:
        """Raises UnsupportedModelError."""
        register_native_family()
        refuse_unattachable(config.model_type)
        self.model = empty_model(config)
        self.layers: tuple[MoeLayer, ...] = moe_layers(self.model)
        self._layer_of: Mapping[int, MoeLayer] = {record.layer: record for record in self.layers}
        keep_one_expert(self.model)

    def record(self, expert: ExpertId) -> MoeLayer | None:
        """Returns the expert's layer; None if the model has no such expert."""
        record = self._layer_of.get(expert.layer)
        return record if record is not None and 0 <= expert.index < record.num_experts else None

    def experts_of(self, layer: int) -> tuple[ExpertId, ...]:
        return tuple(ExpertId(layer=layer, index=index) for index in range(self._layer_of[layer].num_experts))

    def parameters(self, expert: ExpertId) -> dict[str, torch.Tensor]:
        """Returns the expert's parameters by name, as meta tensors."""
        record = self.record(expert)
        assert record is not None, f"no expert {expert}"
        container = self.model.get_submodule(record.name)
        if holds_modules(container):
            module = container.get_submodule(str(expert.index))
            return {name: value.detach() for name, value in module.named_parameters()}
        return {name: value.detach()[0] for name, value in container.named_parameters(recurse=False)}

    def checkpoint_state(self, expert: ExpertId, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the expert's parameters under the keys that `from_pretrained` reads.

        In families that have only fused keys, each value is a slice [1, ...]: see `join_experts`.
        """
        record = self.record(expert)
        assert record is not None, f"no expert {expert}"
        if holds_modules(self.model.get_submodule(record.name)):
            return {f"{record.name}.{expert.index}.{name}": value for name, value in tensors.items()}
        rows = {f"{record.name}.{name}": value.detach() for name, value in tensors.items()}
        return rows_to_checkpoint(self.model, rows, expert.index)

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Returns checkpoint key -> shape for all experts of a layer."""
        states = [self.checkpoint_state(expert, self.parameters(expert)) for expert in self.experts_of(layer)]
        return {key: tuple(value.shape) for key, value in join_experts(states).items()}


def holds_modules(container: nn.Module) -> bool:
    """Whether each expert is a module of its own (the native family), not a row of fused parameters."""
    return next(container.parameters(recurse=False), None) is None


def join_experts(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Joins the `checkpoint_state` of all experts, given in order of layer and index, into one checkpoint state.

    The rows of a key that several experts share are concatenated.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for state in states:
        for key, value in state.items():
            parts.setdefault(key, []).append(value)
    return {key: values[0] if len(values) == 1 else torch.cat(values) for key, values in parts.items()}
