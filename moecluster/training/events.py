"""What a training run tells, as plain records: whoever runs it draws, logs or ignores them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Started:
    """Trunk and experts stand at a step; training goes on from there."""

    step: int
    steps: int
    unigram_bits_per_byte: float  # of the validation text
    bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A step is committed everywhere."""

    step: int
    loss: float  # cross-entropy, nats per token
    # kind -> what is trained on besides it, with its coefficient; None: not told apart, and part of loss, as in
    # histories that older versions wrote
    aux_losses: Mapping[str, float] | None = None
    learning_rate: float
    grad_norm: float  # over trunk and experts, before clipping
    seconds: float
    tokens_per_s: float
    balancedness: float | None  # mean over layers of mean actor load / max actor load; None: no expert was wanted
    attempts: int

    @property
    def total_loss(self) -> float:
        """What the step was trained on."""
        return self.loss + sum((self.aux_losses or {}).values())


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The model against text that it was not trained on."""

    step: int
    bits_per_byte: float
    domains: Mapping[str, float]  # domain -> bits per byte


@dataclass(frozen=True, kw_only=True)
class CheckpointWritten:
    """A complete checkpoint stands under its name."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed:
    """A checkpoint could not be written; training goes on."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class AttemptFailed:
    """An attempt at a step came to nothing; the next one follows."""

    step: int
    attempt: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class WentBack:
    """State was lost: everything was loaded again from the last complete checkpoint."""

    from_step: int
    step: int
    reason: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BeganAgain:
    """The process that the run was in was lost: another one goes on from the last complete checkpoint."""

    checkpoint: str
    restart: int  # counted from 1
    max_restarts: int


Event = Started | StepDone | Evaluated | CheckpointWritten | CheckpointFailed | AttemptFailed | WentBack | BeganAgain
