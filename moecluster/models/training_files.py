"""A checkpoint of training: an ordinary model directory, and in `training/` what only training needs.

    config.json, tokenizer files, model.safetensors.index.json
    model-trunk.safetensors             all weights but the experts'
    model-layer-NNN-experts.safetensors the weights of a layer's experts
    training/state.json                 TrainingState; a directory with it is complete
    training/optimizer-trunk.safetensors            keys STATE/PARAMETER
    training/optimizer-layer-NNN.safetensors        keys INDEX/STATE/PARAMETER

What gates keep (a bias) are buffers of the trunk and stand with its weights.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moecluster.errors import CheckpointError
from moecluster.types import ExpertId

FOLDER = "training"
STATE_FILE = "state.json"
TRUNK_WEIGHTS_NAME = "model-trunk.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What training needs besides tensors. Random numbers are a function of the step and the seed in the settings."""

    step: int  # committed
    data_position: int  # sequences drawn so far
    term: int  # of the coordinator that wrote it
    settings: Mapping[str, Any]  # "section.key" -> value: those that a run cannot change half-way


def expert_weights_name(layer: int) -> str:
    return f"model-layer-{layer:03d}-experts.safetensors"


def expert_optimizer_file(checkpoint: str | Path, layer: int) -> Path:
    return Path(checkpoint) / FOLDER / f"optimizer-layer-{layer:03d}.safetensors"


def trunk_optimizer_file(checkpoint: str | Path) -> Path:
    return Path(checkpoint) / FOLDER / "optimizer-trunk.safetensors"


def write_training_state(checkpoint: str | Path, state: TrainingState) -> None:
    """Makes the directory complete: to be written last."""
    path = Path(checkpoint) / FOLDER / STATE_FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n", encoding="utf-8")


def read_training_state(checkpoint: str | Path) -> TrainingState | None:
    """None if the directory was not written by training. Raises CheckpointError if torn."""
    path = Path(checkpoint) / FOLDER / STATE_FILE
    if not path.is_file():
        return None
    try:
        state = TrainingState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as exc:
        raise CheckpointError(f"{path} cannot be read as a training state: {exc}") from exc
    counts = (state.step, state.data_position, state.term)
    if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(state.settings, dict):
        raise CheckpointError(
            f"{path} cannot be read as a training state: step, data_position and term must be counts, settings a table"
        )
    return state


def read_step(checkpoint: str | Path) -> int | None:
    """The step whose state the checkpoint holds; None if training did not write it."""
    state = read_training_state(checkpoint)
    return None if state is None else state.step


def read_optimizer_state(checkpoint: str | Path, expert: ExpertId) -> dict[str, torch.Tensor] | None:
    """An expert's optimizer state by name; None if the checkpoint has none. Raises CheckpointError if torn."""
    return _read_tensors(expert_optimizer_file(checkpoint, expert.layer), f"{expert.index}/")


def read_trunk_optimizer_state(checkpoint: str | Path) -> dict[str, torch.Tensor] | None:
    """The trunk's optimizer state by name; None if the checkpoint has none. Raises CheckpointError if torn."""
    return _read_tensors(trunk_optimizer_file(checkpoint), "")


def _read_tensors(path: Path, prefix: str) -> dict[str, torch.Tensor] | None:
    """Tensors that own their memory, by their names without the prefix."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118  # it is no dict
            return {key.removeprefix(prefix): file.get_tensor(key).clone() for key in keys}
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"{path} is torn: {exc}") from exc
