"""Single experts straight out of a checkpoint directory, and back to the keys under which they are saved."""

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from moecluster.errors import CheckpointError
from moecluster.hf import ExpertShard, MoeLayer
from moecluster.hf.keys import ParameterSource, convert_rows, expert_sources
from moecluster.models.checkpoint import Checkpoint
from moecluster.models.expert_layout import ExpertLayout, holds_modules
from moecluster.models.model_config import read_loadable_config
from moecluster.types import ExpertId


class ExpertSource:
    """Loads experts one at a time, reading only their own bytes.

    Works for any family that moecluster can attach, in both checkpoint layouts (keys per expert, or fused keys per
    layer), and for our own family, whose experts are modules in a list. The model is built once, on the meta device.
    Every method raises CheckpointError for a checkpoint that is torn, incomplete or of another shape.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises CheckpointError or UnsupportedModelError."""
        self.checkpoint = Checkpoint.open(path)
        self.layout = ExpertLayout(read_loadable_config(path))
        self.layers: tuple[MoeLayer, ...] = self.layout.layers
        self._model = self.layout.model

    def load(self, expert: ExpertId, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The expert as a module on the CPU: rows [n, D] in, rows [n, D] out, without the gate weight."""
        container = self._container(expert)
        if holds_modules(container):
            return self._load_module(expert, dtype)
        rows = self._read_rows(expert)
        expected = {name: tuple(value.shape[1:]) for name, value in container.named_parameters(recurse=False)}
        self._check_shapes(expert, expected, rows)
        # Parameters of one model must keep one order, whatever the order of the checkpoint's keys.
        return ExpertShard(container, {name: rows[name].to(dtype).contiguous() for name in expected})

    def expert_bytes(self, expert: ExpertId) -> int:
        """Bytes that the expert has in the checkpoint, from headers alone."""
        if holds_modules(self._container(expert)):
            return sum(self.checkpoint.info(key).num_bytes for key in self._module_keys(expert).values())
        total = 0
        for key, row in (pair for source in self._sources(expert) for pair in self._reads(source, expert).values()):
            info = self.checkpoint.info(key)
            total += info.num_bytes if row is None else info.num_bytes // info.shape[0]
        return total

    def state_for_checkpoint(self, expert: ExpertId, module: nn.Module) -> dict[str, torch.Tensor]:
        """The expert's parameters under the keys that `from_pretrained` loads back; the inverse of `load`.

        Of families that know only fused keys, each value is a slice [1, ...]: see `join_experts`.
        """
        self._record(expert)
        return self.layout.checkpoint_state(expert, {name: p.detach() for name, p in module.named_parameters()})

    def _record(self, expert: ExpertId) -> MoeLayer:
        record = self.layout.record(expert)
        if record is None:
            raise CheckpointError(f"{self.checkpoint.path} has no expert {expert}: its layers are {self._describe()}")
        return record

    def _describe(self) -> str:
        return ", ".join(f"{record.layer} ({record.num_experts} experts)" for record in self.layers)

    def _container(self, expert: ExpertId) -> nn.Module:
        return self._model.get_submodule(self._record(expert).name)

    # Families with fused parameters.

    @cached_property
    def _sources_by_module(self) -> dict[str, list[ParameterSource]]:
        return expert_sources(self._model, self.checkpoint.tensors, [record.name for record in self.layers])

    def _sources(self, expert: ExpertId) -> list[ParameterSource]:
        return self._sources_by_module[self._record(expert).name]

    def _reads(self, source: ParameterSource, expert: ExpertId) -> dict[str, tuple[str, int | None]]:
        """Source pattern -> the key to read and, where the key holds all experts, the row."""
        num_experts = self._record(expert).num_experts
        reads: dict[str, tuple[str, int | None]] = {}
        for pattern, keys in source.keys.items():
            if source.is_per_expert:
                if len(keys) != num_experts:
                    raise CheckpointError(
                        f"{self.checkpoint.path} has {len(keys)} of {num_experts} experts' keys for {source.parameter}"
                    )
                reads[pattern] = (keys[expert.index], None)
                continue
            shape = self.checkpoint.info(keys[0]).shape
            if len(keys) != 1 or shape[:1] != (num_experts,):
                raise CheckpointError(
                    f"{keys[0]} in {self.checkpoint.path} has shape {list(shape)}: {num_experts} experts expected first"
                )
            reads[pattern] = (keys[0], expert.index)
        return reads

    def _read_rows(self, expert: ExpertId) -> dict[str, torch.Tensor]:
        """Parameter name -> the expert's row."""
        rows: dict[str, torch.Tensor] = {}
        for source in self._sources(expert):
            reads = self._reads(source, expert)
            tensors = {pattern: self.checkpoint.read(key, row) for pattern, (key, row) in reads.items()}
            try:
                converted = convert_rows(self._model, source, tensors)
            except (RuntimeError, ValueError, IndexError) as error:
                raise CheckpointError(
                    f"expert {expert} of {self.checkpoint.path} cannot be put together for {source.parameter}: "
                    f"its tensors have shapes {[list(tensor.shape) for tensor in tensors.values()]}"
                ) from error
            rows |= {name.rpartition(".")[2]: value for name, value in converted.items()}
        return rows

    def _check_shapes(
        self, expert: ExpertId, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, torch.Tensor]
    ) -> None:
        for name, shape in expected.items():
            if name not in found:
                raise CheckpointError(f"{self.checkpoint.path} has no {name} for expert {expert}")
            if tuple(found[name].shape) != shape:
                raise CheckpointError(
                    f"{name} of expert {expert} in {self.checkpoint.path} has shape {list(found[name].shape)}, "
                    f"its config.json says {list(shape)}"
                )

    # Our own family: each expert is a module.

    def _module_keys(self, expert: ExpertId) -> dict[str, str]:
        """Name in the expert's state -> checkpoint key."""
        record = self._record(expert)
        module = self._model.get_submodule(f"{record.name}.{expert.index}")
        return {name: f"{record.name}.{expert.index}.{name}" for name in module.state_dict()}

    def _load_module(self, expert: ExpertId, dtype: torch.dtype) -> nn.Module:
        module = copy.deepcopy(self._model.get_submodule(f"{self._record(expert).name}.{expert.index}"))
        state = {name: self.checkpoint.read(key).to(dtype) for name, key in self._module_keys(expert).items()}
        self._check_shapes(expert, {name: tuple(value.shape) for name, value in module.state_dict().items()}, state)
        module.load_state_dict(state, assign=True)
        return module
