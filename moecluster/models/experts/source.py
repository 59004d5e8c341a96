"""Single experts straight out of a checkpoint directory."""

import importlib
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from moecluster.errors import CheckpointError
from moecluster.models.checkpoint.headers import TensorInfo
from moecluster.models.checkpoint.reader import Checkpoint
from moecluster.models.experts.native import own_experts
from moecluster.models.experts.swiglu import swiglu_experts
from moecluster.types import ExpertId, MoeLayer

Origin = tuple[tuple[int | None, ...], ...]


class ExpertReader(Protocol):
    """What knows the experts of one checkpoint. It is asked for experts of its layers only."""

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
    layer), and for our own family, whose experts are modules in a list. transformers is imported only for families
    that need it. Every method raises CheckpointError for a checkpoint that is torn, incomplete or of another shape.
    """

    def __init__(self, path: str | Path | Checkpoint) -> None:
        """path: a directory of this host, or a checkpoint that is open already. Raises CheckpointError or
        UnsupportedModelError."""
        self.checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
        self._reader: ExpertReader = (
            own_experts(self.checkpoint) or swiglu_experts(self.checkpoint) or _family_experts(self.checkpoint)
        )
        self.layers: tuple[MoeLayer, ...] = self._reader.layers

    def load(self, expert: ExpertId, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The expert as a module on the CPU: rows [n, D] in, rows [n, D] out, without the gate weight."""
        self._check(expert)
        return self._reader.load(expert, dtype)

    def empty(self, expert: ExpertId) -> nn.Module:
        """The same module on the meta device: names and shapes, and `load_state_dict(..., assign=True)` fills it."""
        self._check(expert)
        return self._reader.empty(expert)

    def expert_bytes(self, expert: ExpertId) -> int:
        """Bytes that the expert has in the checkpoint, from headers alone."""
        self._check(expert)
        return self._reader.expert_bytes(expert)

    def reads(self, expert: ExpertId) -> tuple[tuple[str, int | None], ...]:
        """The checkpoint's keys that the expert is made of; with a row where a key holds all experts of the layer."""
        self._check(expert)
        return self._reader.reads(expert)

    def origin(self, expert: ExpertId) -> Origin | None:
        """Where on the disk the expert's bytes lie: experts of one origin are equal. None if that cannot be told."""
        parts = []
        try:
            for key, row in self.reads(expert):
                info = self.checkpoint.info(key)
                if not isinstance(info, TensorInfo):
                    return None
                file = info.file.stat()
                parts.append((file.st_dev, file.st_ino, file.st_mtime_ns, info.begin, info.num_bytes, row))
        except (CheckpointError, OSError):
            return None  # loading says what is wrong
        return tuple(parts)

    def _check(self, expert: ExpertId) -> None:
        if not any(layer.layer == expert.layer and 0 <= expert.index < layer.num_experts for layer in self.layers):
            held = ", ".join(f"{layer.layer} ({layer.num_experts} experts)" for layer in self.layers)
            raise CheckpointError(f"{self.checkpoint.path} has no expert {expert}: its layers are {held}")


def _family_experts(checkpoint: Checkpoint) -> ExpertReader:
    """Imported here and not above: with it comes transformers' modelling code, 150 MB and seconds of start."""
    module = importlib.import_module("moecluster.models.experts.family")
    reader: ExpertReader = module.FamilyExperts(checkpoint)
    return reader
