"""Reads experts of the native family, which are modules in a list, without transformers."""

from typing import Any

import torch
from torch import nn

from moecluster.errors import CheckpointError, ConfigError, UnsupportedModelError
from moecluster.models.checkpoint.reader import CONFIG_NAME, Checkpoint
from moecluster.moe.experts.base import Expert
from moecluster.moe.experts.registry import make_expert
from moecluster.types import ExpertId, MoeLayer

NATIVE_MODEL_TYPE = "moecluster"


def native_experts(checkpoint: Checkpoint) -> "NativeExpertReader | None":
    """Returns a reader; None for another family. Raises UnsupportedModelError if the config makes no valid expert."""
    return NativeExpertReader(checkpoint) if checkpoint.config().get("model_type") == NATIVE_MODEL_TYPE else None


class NativeExpertReader:
    """An ExpertReader."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config()
        hidden_size, num_experts = self._setting("hidden_size", int), self._setting("num_experts", int)
        self.layers = tuple(
            MoeLayer(
                layer=int(layer),
                num_experts=num_experts,
                hidden_size=hidden_size,
                name=f"model.layers.{layer}.mlp.experts",
            )
            for layer in self._setting("moe_layers", list)
        )
        if not self.layers:
            raise UnsupportedModelError(f"{checkpoint.path} has no layer with experts")
        try:
            with torch.device("meta"):
                self._empty = self._make()
        except (ConfigError, RuntimeError) as error:
            raise UnsupportedModelError(f"{CONFIG_NAME} in {checkpoint.path} cannot be used: {error}") from error

    def load(self, expert: ExpertId, dtype: torch.dtype) -> nn.Module:
        state = {name: self._checkpoint.read(key, dtype=dtype) for name, key in self._keys(expert).items()}
        for name, value in self._empty.state_dict().items():
            if state[name].shape != value.shape:
                raise CheckpointError(
                    f"{name} of expert {expert} in {self._checkpoint.path} has shape {list(state[name].shape)}, "
                    f"its {CONFIG_NAME} says {list(value.shape)}"
                )
        module = self.empty(expert)
        module.load_state_dict(state, assign=True)
        return module

    def empty(self, expert: ExpertId) -> nn.Module:
        with torch.device("meta"):
            return self._make()

    def expert_bytes(self, expert: ExpertId) -> int:
        return sum(self._checkpoint.info(key).num_bytes for key in self._keys(expert).values())

    def reads(self, expert: ExpertId) -> tuple[tuple[str, int | None], ...]:
        return tuple((key, None) for key in self._keys(expert).values())

    def _keys(self, expert: ExpertId) -> dict[str, str]:
        """Returns name in the expert's state dict -> checkpoint key."""
        prefix = next(layer.name for layer in self.layers if layer.layer == expert.layer)
        return {name: f"{prefix}.{expert.index}.{name}" for name in self._empty.state_dict()}

    def _make(self) -> Expert:
        return make_expert(
            self._setting("expert_kind", str),
            hidden_size=self._setting("hidden_size", int),
            inner_size=self._setting("moe_intermediate_size", int),
            activation=self._setting("hidden_act", str),
        )

    def _setting(self, name: str, kind: type) -> Any:
        value = self._config.get(name)
        if not isinstance(value, kind):
            raise UnsupportedModelError(
                f"{CONFIG_NAME} in {self._checkpoint.path} cannot be used: {name} is {value!r}, no {kind.__name__}"
            )
        return value
