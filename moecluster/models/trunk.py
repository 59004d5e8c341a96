"""Loads the trunk of a model: everything but the experts, which are never in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moecluster.errors import CheckpointError
from moecluster.hf.interface import Backend, attach
from moecluster.hf.keys import trunk_to_checkpoint
from moecluster.hf.modelling import load_without_experts
from moecluster.models.checkpoint.reader import Checkpoint
from moecluster.models.config import read_loadable_config


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Implements StoredTensor."""

    checkpoint: Checkpoint
    key: str

    def __getitem__(self, whole: Any) -> torch.Tensor:
        return self.checkpoint.read_stored(self.key)


def load_trunk(
    path: str | Path | Checkpoint,
    backend: Backend,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Loads a model whose experts are computed by the backend. It is in evaluation mode, with gradients on.

    path: a directory on this host, or an open checkpoint. Only the trunk's bytes are read, and peak memory is the
    trunk's. Raises CheckpointError if the directory is torn, or if a weight of the trunk is missing or has another
    shape; UnsupportedModelError if the model is not an MoE, cannot be dequantized, or cannot be attached.
    """
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    directory = checkpoint.files.metadata
    weights = {key: _Stored(checkpoint=checkpoint, key=key) for key in checkpoint.tensors}
    model, report = load_without_experts(read_loadable_config(directory), weights, directory, dtype)
    _check_complete(checkpoint.path, report)
    attach(model, backend)
    model.to(torch.device(device))  # type: ignore[arg-type]  # wrapped upstream
    return model


def _check_complete(path: str | Path, report: dict[str, object]) -> None:
    """Raises CheckpointError for a missing or mismatched weight, which would be random."""
    missing = sorted(str(key) for key in report["missing_keys"])  # type: ignore[attr-defined]
    if missing:
        raise CheckpointError(f"{path} has no {missing[0]} ({len(missing)} weights of the trunk are missing)")
    mismatched = sorted(report["mismatched_keys"])  # type: ignore[call-overload]
    if mismatched:
        name, found, expected = mismatched[0]
        raise CheckpointError(f"{name} in {path} has shape {list(found)}, its config.json says {list(expected)}")
    if report["error_msgs"]:
        raise CheckpointError(f"{path} cannot be loaded: {report['error_msgs']}")


def trunk_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Returns names and parameters of the trunk, in the model's order. Tied ones appear once."""
    return model.named_parameters()


def checkpoint_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns the trunk's weights under the keys that `from_pretrained` reads. With the experts' weights they make a
    whole checkpoint."""
    tied = set(model.all_tied_weights_keys)
    return trunk_to_checkpoint(model, {name: value for name, value in model.state_dict().items() if name not in tied})
