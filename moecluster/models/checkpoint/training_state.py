"""A training checkpoint: an ordinary model directory, with the files that only training needs in `training/`.

    config.json, tokenizer files, model.safetensors.index.json
    model-trunk.safetensors             all weights but the experts'
    model-layer-NNN-experts.safetensors the weights of a layer's experts
    model-carried.safetensors           tensors of the original model that are not trained, if there are any
    training/state.json                 TrainingState; a directory with it is complete
    training/optimizer-trunk.safetensors            keys STATE/PARAMETER
    training/optimizer-layer-NNN.safetensors        keys INDEX/STATE/PARAMETER

A gate's own state (a bias) is a buffer of the trunk and is saved with its weights.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from moecluster.models.checkpoint.files import CheckpointFiles, FolderFiles, Seen
from moecluster.models.checkpoint.headers import read_header
from moecluster.models.checkpoint.reader import Checkpoint
from moecluster.models.checkpoint.training_progress import FOLDER
from moecluster.types import ExpertId

CARRIED_NAME = "model-carried.safetensors"
TRUNK_WEIGHTS_NAME = "model-trunk.safetensors"


def expert_weights_name(layer: int) -> str:
    return f"model-layer-{layer:03d}-experts.safetensors"


def expert_optimizer_file(checkpoint: str | Path, layer: int) -> Path:
    return Path(checkpoint) / FOLDER / f"optimizer-layer-{layer:03d}.safetensors"


def trunk_optimizer_file(checkpoint: str | Path) -> Path:
    return Path(checkpoint) / FOLDER / "optimizer-trunk.safetensors"


def read_optimizer_state(checkpoint: CheckpointFiles, expert: ExpertId) -> dict[str, torch.Tensor] | None:
    """Returns an expert's optimizer state by name; None if the checkpoint has none. Raises CheckpointError if torn."""
    name = expert_optimizer_file(checkpoint.path, expert.layer).name
    return _read_tensors(_TrainingFiles(checkpoint), name, f"{expert.index}/")


def read_trunk_optimizer_state(checkpoint: str | Path) -> dict[str, torch.Tensor] | None:
    """Returns the trunk's optimizer state by name; None if the checkpoint has none. Raises CheckpointError if torn."""
    return _read_tensors(_TrainingFiles(FolderFiles(checkpoint)), trunk_optimizer_file(checkpoint).name, "")


class _TrainingFiles:
    """The CheckpointFiles of a checkpoint's folder training/, on this host or on another."""

    def __init__(self, whole: CheckpointFiles) -> None:
        self._whole = whole
        self.path, self.metadata = whole.path / FOLDER, whole.metadata / FOLDER

    def weights(self) -> Mapping[str, int]:
        return {name.removeprefix(f"{FOLDER}/"): size for name, size in self._whole.optimizer_files().items()}

    def optimizer_files(self) -> Mapping[str, int]:
        return {}

    def read_into(self, name: str, begin: int, out: memoryview, seen: Seen | None = None) -> None:
        self._whole.read_into(f"{FOLDER}/{name}", begin, out, seen)


def _read_tensors(files: CheckpointFiles, name: str, prefix: str) -> dict[str, torch.Tensor] | None:
    """Reads the tensors of a file whose names have the prefix; returns them by name without it. They own their memory.

    None if there is no such file.
    """
    size = files.weights().get(name)
    if size is None:
        return None
    stored = Checkpoint(files=files, tensors=read_header(files, name, size))
    return {key.removeprefix(prefix): stored.read_stored(key) for key in stored.tensors if key.startswith(prefix)}
