"""Loads single experts straight from a checkpoint directory."""

import importlib
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from moecluster.errors import CheckpointError
from moecluster.models.checkpoint.headers import TensorInfo
from moecluster.models.checkpoint.reader import Checkpoint
from moecluster.models.experts.native import native_experts
from moecluster.models.experts.swiglu import swiglu_experts
from moecluster.types import ExpertId, MoeLayer

Origin = tuple[tuple[int | None, ...], ...]


class ExpertReader(Protocol):
    """Reads the experts of one checkpoint. Callers pass only experts of its layers."""

    layers: tuple[MoeLayer, ...]

    def load(self, expert: ExpertId, dtype: torch.dtype) -> nn.Module:
        """See ExpertSource."""

    def empty(self, expert: ExpertId) -> nn.Module:
        """See ExpertSource."""

    def expert_bytes(self, expert: ExpertId) -> int:
        """See ExpertSource."""

    def reads(self, expert: ExpertId) -> tuple[tuple[str, int | None], ...]:
        """See ExpertSource."""


class ExpertSource:
    """Loads experts one at a time, reading only their own bytes.

    Works for any family that moecluster can attach, in both checkpoint layouts (keys per expert, or fused keys per
    layer), and for the native family, whose experts are modules in a list. Imports transformers only for families that
    need it. Every method raises CheckpointError if the checkpoint is torn, incomplete or of another shape.
    """

    def __init__(self, path: str | Path | Checkpoint) -> None:
        """path: a directory on this host, or an open checkpoint. Raises CheckpointError or UnsupportedModelError."""
        self.checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
        self._reader: ExpertReader = (
            native_experts(self.checkpoint) or swiglu_experts(self.checkpoint) or _family_experts(self.checkpoint)
        )
        self.layers: tuple[MoeLayer, ...] = self._reader.layers

    def load(self, expert: ExpertId, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Returns the expert as a module on the CPU: rows [n, D] -> rows [n, D], not multiplied by the gate weight."""
        self._check(expert)
        return self._reader.load(expert, dtype)

    def empty(self, expert: ExpertId) -> nn.Module:
        """Returns the same module on the meta device; `load_state_dict(..., assign=True)` fills it."""
        self._check(expert)
        return self._reader.empty(expert)

    def expert_bytes(self, expert: ExpertId) -> int:
        """Returns the expert's bytes in the checkpoint, from headers alone."""
        self._check(expert)
        return self._reader.expert_bytes(expert)

    def reads(self, expert: ExpertId) -> tuple[tuple[str, int | None], ...]:
        """Returns the checkpoint keys of the expert, each with the row if the key holds all experts of the layer."""
        self._check(expert)
        return self._reader.reads(expert)

    def origin(self, expert: ExpertId) -> Origin | None:
        """Returns where on disk the expert's bytes are: experts with the same origin are equal. None if unknown."""
        parts = []
        try:
            for key, row in self.reads(expert):
                info = self.checkpoint.info(key)
                if not isinstance(info, TensorInfo):
                    return None
                file = info.file.stat()
                parts.append((file.st_dev, file.st_ino, file.st_mtime_ns, info.begin, info.num_bytes, row))
        except (CheckpointError, OSError):
            return None  # loading will report the error
        return tuple(parts)

    def _check(self, expert: ExpertId) -> None:
        if not any(layer.layer == expert.layer and 0 <= expert.index < layer.num_experts for layer in self.layers):
            held = ", ".join(f"{layer.layer} ({layer.num_experts} experts)" for layer in self.layers)
            raise CheckpointError(f"{self.checkpoint.path} has no expert {expert}: its layers are {held}")


def _family_experts(checkpoint: Checkpoint) -> ExpertReader:
    """Imports family.py lazily: it brings in transformers' modelling code, 150 MB and seconds of startup."""
    module = importlib.import_module("moecluster.models.experts.family")
    reader: ExpertReader = module.FamilyExperts(checkpoint)
    return reader
