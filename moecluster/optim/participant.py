"""Who takes part in an optimizer step of two phases."""

from collections.abc import Sequence
from typing import Protocol

from moecluster.types import (
    ExpertActorStatus,
    MessageKey,
    ReduceResult,
    StepTag,
)


class Participant(Protocol):
    """What takes part in a training step: an expert actor, or a rank's trunk. Older terms' orders raise StaleOrder."""

    name: str

    def reduce(self, tag: StepTag, expected: Sequence[MessageKey]) -> ReduceResult:
        """Sums the attempt's gradients. Raises AttemptAborted if they do not come from exactly these messages."""

    def prepare(self, tag: StepTag, *, clip_scale: float, learning_rate: float) -> str:
        """Computes the new state beside the old one; returns the incarnation."""

    def commit(self, tag: StepTag) -> str:
        """Swaps the prepared state in; repeated is fine. Returns the incarnation."""

    def abort(self, tag: StepTag) -> None:
        """Forgets the attempt: gradients, kept activations, prepared state. Unknown attempts are fine."""

    def status(self, training_term: int = 0) -> ExpertActorStatus:
        """Fences with the term if it is not 0, then reports."""
