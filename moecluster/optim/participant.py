"""The interface of a participant in a two-phase optimizer step."""

from collections.abc import Sequence
from typing import Protocol

from moecluster.types import (
    ExpertActorStatus,
    MessageKey,
    ReduceResult,
    StepTag,
)


class Participant(Protocol):
    """A participant in training steps: an expert actor, or a rank's trunk. Requests of an older term raise
    StaleRequest."""

    name: str

    def reduce(self, tag: StepTag, expected: Sequence[MessageKey]) -> ReduceResult:
        """Sums the attempt's gradients. Raises AttemptAborted if the messages received are not exactly the expected
        ones."""

    def prepare(self, tag: StepTag, *, clip_scale: float, learning_rate: float) -> str:
        """Computes the new state beside the old one. Returns the incarnation."""

    def commit(self, tag: StepTag) -> str:
        """Swaps the prepared state in. Idempotent. Returns the incarnation."""

    def abort(self, tag: StepTag) -> None:
        """Drops the attempt: gradients, saved activations, prepared state. An unknown attempt is no error."""

    def status(self, training_term: int = 0) -> ExpertActorStatus:
        """Fences with the term if it is not 0, then returns the status."""
