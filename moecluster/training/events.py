"""The events of a training run, as plain records. The caller plots, logs or ignores them."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args


@dataclass(frozen=True, kw_only=True)
class Started:
    """Trunk and experts are loaded at a step; training continues from there."""

    step: int
    steps: int
    unigram_bits_per_byte: float  # of the validation text
    bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A step is committed by all participants."""

    step: int
    loss: float  # cross-entropy, nats per token
    # kind -> auxiliary loss times its coefficient; None: not recorded separately but included in loss, as in histories
    # that older versions wrote
    aux_losses: Mapping[str, float] | None = None
    learning_rate: float
    grad_norm: float  # over trunk and experts, before clipping
    seconds: float
    tokens_per_s: float
    balancedness: float | None  # mean over layers of mean actor load / max actor load; None: no assignments
    attempts: int

    @property
    def total_loss(self) -> float:
        """The loss that the step minimizes: cross-entropy plus auxiliary losses."""
        return self.loss + sum((self.aux_losses or {}).values())


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The model was evaluated on validation text."""

    step: int
    bits_per_byte: float
    domains: Mapping[str, float]  # domain -> bits per byte


@dataclass(frozen=True, kw_only=True)
class CheckpointWritten:
    """A complete checkpoint was written."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed:
    """A checkpoint could not be written; training continues."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class AttemptFailed:
    """An attempt at a step failed; the next attempt follows."""

    step: int
    attempt: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class WentBack:
    """State was lost, and everything was reloaded from the last complete checkpoint."""

    from_step: int
    step: int
    reason: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BeganAgain:
    """The process of the run died; a new one continues from the last complete checkpoint."""

    checkpoint: str
    restart: int  # counted from 1
    max_restarts: int


Event = Started | StepDone | Evaluated | CheckpointWritten | CheckpointFailed | AttemptFailed | WentBack | BeganAgain
_KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in get_args(Event)}


def encode_event(event: Event) -> str:
    """Returns one line of JSON."""
    return json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)})


def decode_event(line: str) -> Event:
    """Returns the event of such a line. Raises ValueError, naming what is wrong."""
    record = json.loads(line)
    kind = _KINDS.get(str(record.pop("event", ""))) if isinstance(record, dict) else None
    if kind is None:
        raise ValueError(f"no event of a training run: {line[:80]!r}")
    try:
        event: Event = kind(**record)
    except TypeError as exc:
        raise ValueError(f"{kind.__name__}: {exc}") from exc
    return event
