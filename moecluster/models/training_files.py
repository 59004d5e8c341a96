"""Names and reading of a checkpoint's training part: `training/` in an ordinary model directory."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moecluster.errors import CheckpointError
from moecluster.types import ExpertId

FOLDER = "training"
STATE_FILE = "state.json"


def expert_optimizer_file(checkpoint: str | Path, layer: int) -> Path:
    """Optimizer state of a layer's experts, keys `INDEX/STATE/PARAMETER`."""
    return Path(checkpoint) / FOLDER / f"optimizer-layer-{layer:03d}.safetensors"


def read_state(checkpoint: str | Path) -> dict[str, object] | None:
    """What state.json says; None if the directory was not written by training. Raises CheckpointError if torn."""
    path = Path(checkpoint) / FOLDER / STATE_FILE
    if not path.is_file():
        return None
    try:
        state: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc
    return state


def read_step(checkpoint: str | Path) -> int | None:
    """The step whose state the checkpoint holds; None if training did not write it."""
    state = read_state(checkpoint)
    step = None if state is None else state.get("step")
    return step if isinstance(step, int) else None


def read_optimizer_state(checkpoint: str | Path, expert: ExpertId) -> dict[str, torch.Tensor] | None:
    """An expert's optimizer state by name; None if the checkpoint has none. Raises CheckpointError if torn."""
    path = expert_optimizer_file(checkpoint, expert.layer)
    if not path.is_file():
        return None
    prefix = f"{expert.index}/"
    try:
        with safe_open(path, framework="pt") as file:
            return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"{path} is torn: {exc}") from exc
