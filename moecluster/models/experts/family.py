"""Reads experts of any family of transformers, which defines their checkpoint keys and their computation."""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import nn

from moecluster.errors import CheckpointError
from moecluster.hf.keys import ParameterSource, convert_rows, expert_sources
from moecluster.hf.shard import ExpertShard
from moecluster.memory import empty_mapped
from moecluster.models.checkpoint.reader import Checkpoint
from moecluster.models.config import read_loadable_config
from moecluster.models.experts.layout import ExpertLayout
from moecluster.types import ExpertId, MoeLayer


class FamilyExperts:
    """An ExpertReader. Builds the model once, on the meta device."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError or UnsupportedModelError."""
        self._checkpoint = checkpoint
        self._layout = ExpertLayout(read_loadable_config(checkpoint.files.metadata))
        self._model = self._layout.model
        self.layers: tuple[MoeLayer, ...] = self._layout.layers

    def load(self, expert: ExpertId, dtype: torch.dtype) -> nn.Module:
        container = self._model.get_submodule(self._record(expert).name)
        rows = self._read_rows(expert, dtype)
        expected = {name: tuple(value.shape[1:]) for name, value in container.named_parameters(recurse=False)}
        self._check_shapes(expert, expected, rows)
        # The order of the parameters must not depend on the order of the checkpoint's keys.
        return ExpertShard.of_family(container, {name: rows[name].contiguous() for name in expected})

    def empty(self, expert: ExpertId) -> nn.Module:
        container = self._model.get_submodule(self._record(expert).name)
        rows = {name: value.detach()[0] for name, value in container.named_parameters(recurse=False)}
        return ExpertShard.of_family(container, rows)

    def expert_bytes(self, expert: ExpertId) -> int:
        total = 0
        for key, row in self.reads(expert):
            info = self._checkpoint.info(key)
            total += info.num_bytes if row is None else info.num_bytes // info.shape[0]
        return total

    def reads(self, expert: ExpertId) -> tuple[tuple[str, int | None], ...]:
        return tuple(pair for source in self._sources(expert) for pair in self._reads(source, expert).values())

    def _record(self, expert: ExpertId) -> MoeLayer:
        record = self._layout.record(expert)
        assert record is not None, f"no expert {expert}"
        return record

    @cached_property
    def _sources_by_module(self) -> dict[str, list[ParameterSource]]:
        return expert_sources(self._model, self._checkpoint.tensors, [record.name for record in self.layers])

    def _sources(self, expert: ExpertId) -> list[ParameterSource]:
        return self._sources_by_module[self._record(expert).name]

    def _reads(self, source: ParameterSource, expert: ExpertId) -> dict[str, tuple[str, int | None]]:
        """Returns source pattern -> (key to read, row if the key holds all experts)."""
        num_experts = self._record(expert).num_experts
        reads: dict[str, tuple[str, int | None]] = {}
        for pattern, keys in source.keys.items():
            if source.is_per_expert:
                if len(keys) != num_experts:
                    raise CheckpointError(
                        f"{self._checkpoint.path} has {len(keys)} of {num_experts} experts' keys for {source.parameter}"
                    )
                reads[pattern] = (keys[expert.index], None)
                continue
            shape = self._checkpoint.info(keys[0]).shape
            if len(keys) != 1 or shape[:1] != (num_experts,):
                raise CheckpointError(
                    f"{keys[0]} in {self._checkpoint.path} has shape {list(shape)}: "
                    f"{num_experts} experts expected first"
                )
            reads[pattern] = (keys[0], expert.index)
        return reads

    def _read_rows(self, expert: ExpertId, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Returns parameter name -> the expert's row."""
        rows: dict[str, torch.Tensor] = {}
        for source in self._sources(expert):
            reads = self._reads(source, expert)
            tensors = {pattern: self._checkpoint.read(key, row, dtype) for pattern, (key, row) in reads.items()}
            try:
                converted = convert_rows(self._model, source, tensors)
            except (RuntimeError, ValueError, IndexError) as error:
                raise CheckpointError(
                    f"expert {expert} of {self._checkpoint.path} cannot be put together for {source.parameter}: "
                    f"its tensors have shapes {[list(tensor.shape) for tensor in tensors.values()]}"
                ) from error
            for name, value in converted.items():
                row = value
                if source.converter is not None:  # move the row out of the malloc memory that the conversion allocated
                    row = empty_mapped(tuple(value.shape), dtype)
                    row.copy_(value)
                rows[name.rpartition(".")[2]] = row
        return rows

    def _check_shapes(
        self, expert: ExpertId, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, torch.Tensor]
    ) -> None:
        for name, shape in expected.items():
            if name not in found:
                raise CheckpointError(f"{self._checkpoint.path} has no {name} for expert {expert}")
            if tuple(found[name].shape) != shape:
                raise CheckpointError(
                    f"{name} of expert {expert} in {self._checkpoint.path} has shape {list(found[name].shape)}, "
                    f"its config.json says {list(shape)}"
                )
