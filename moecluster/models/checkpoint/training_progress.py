"""The training progress stored in a checkpoint: a small file that is read without torch."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecluster.config.retired import current_names
from moecluster.errors import CheckpointError
from moecluster.models.checkpoint.checksums import json_crc
from moecluster.models.checkpoint.files import TRAINING_FOLDER

FOLDER = TRAINING_FOLDER
STATE_FILE = "state.json"
TRAINING_STATE = f"{FOLDER}/{STATE_FILE}"  # below a checkpoint
CHECKSUM = "crc32"  # of all other fields


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The training state besides tensors. Random numbers are a function of the step and the seed in the settings."""

    step: int  # committed
    data_position: int  # sequences drawn so far
    term: int  # of the coordinator that wrote it
    settings: Mapping[str, Any]  # "section.key" -> value, of the settings that cannot change during a run


def write_training_state(checkpoint: str | Path, state: TrainingState) -> None:
    """Writes the state. Call it last: this file marks the directory as complete."""
    path = Path(checkpoint) / FOLDER / STATE_FILE
    path.parent.mkdir(exist_ok=True)
    content = dataclasses.asdict(state)
    content[CHECKSUM] = json_crc(content)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_training_state(checkpoint: str | Path) -> TrainingState | None:
    """Returns the state, with retired settings under their new names; None if training did not write the directory.

    Raises CheckpointError if it is damaged.
    """
    path = Path(checkpoint) / FOLDER / STATE_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written = content.pop(CHECKSUM, None) if isinstance(content, dict) else None
        if written is not None and written != json_crc(content):
            raise CheckpointError(f"{path} is damaged: it is not what was written; copy it again")
        state = TrainingState(**content)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as exc:
        raise CheckpointError(f"{path} cannot be read as a training state: {exc}") from exc
    counts = (state.step, state.data_position, state.term)
    if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(state.settings, dict):
        raise CheckpointError(
            f"{path} cannot be read as a training state: step, data_position and term must be counts, settings a table"
        )
    return dataclasses.replace(state, settings=current_names(state.settings))


def read_step(checkpoint: str | Path) -> int | None:
    """Returns the checkpoint's step; None if training did not write it."""
    state = read_training_state(checkpoint)
    return None if state is None else state.step
