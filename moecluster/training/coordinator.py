"""Two-phase commit of one optimizer step: Reduce, Prepare, Commit; or Abort. All participants apply it, or none.

All participants reduce; the norm over all gradients gives the clip scale; all prepare the new state beside the old one;
once all hold it, all commit. A coordinator that takes over after a crash first fences with a higher term. Then: if any
participant has committed (step, attempt), all commit it; if all have prepared it, all commit it; otherwise it aborts.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from moecluster.errors import (
    AttemptAborted,
    DeadlineExceeded,
    Exhausted,
    MoeClusterError,
    StaleRequest,
    StateLost,
    Unavailable,
    UserError,
)
from moecluster.optim.participant import Participant
from moecluster.types import ExpertActorStatus, MessageKey, StepTag

AnswerT = TypeVar("AnswerT")

# A request or reply was lost. All calls are idempotent, so they are retried.
_REPEATABLE = (Unavailable, DeadlineExceeded, Exhausted)
# If several participants fail, the error that comes first in this list is raised.
_GRAVEST_FIRST: tuple[type[MoeClusterError], ...] = (StateLost, StaleRequest, UserError, AttemptAborted)


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """Metrics of a committed step."""

    grad_norm: float  # over trunk and experts, before clipping
    clip_scale: float


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """The state of training after a takeover."""

    step: int | None  # committed by all participants; None: nothing since the load
    next_attempt: int  # the lowest attempt number above all that participants have seen


class StepCoordinator:
    """Runs the steps of one term over a fixed set of participants. Not thread-safe; close() ends its threads."""

    def __init__(
        self,
        participants: Mapping[str, Participant],
        *,
        term: int,
        max_grad_norm: float = 0.0,
        repeat_s: float = 5.0,
        pause_s: float = 0.2,
    ) -> None:
        """max_grad_norm: 0 disables clipping. repeat_s: how long an unanswered call is retried, every pause_s.

        Each call to a participant has its own deadline as well. A dead participant costs repeat_s.
        """
        self.term = term
        self._participants = dict(sorted(participants.items()))
        self._max_grad_norm = max_grad_norm
        self._repeat_s = repeat_s
        self._pause_s = pause_s
        self._incarnations: dict[str, str] = {}  # learned by recover()
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(self._participants)), thread_name_prefix="coordinator")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def recover(self) -> Recovered:
        """Fences all participants and brings them to the same step. Call it once, before the first step.

        Raises StateLost if that is impossible, StaleRequest if a higher term has taken over.
        """
        statuses = self._fence()
        self._incarnations = {name: status.incarnation for name, status in statuses.items()}
        committed = [status.committed for status in statuses.values()]
        prepared = [status.prepared for status in statuses.values()]
        latest = max((c for c in committed if c), key=_attempt_of, default=None)
        open_attempt = max((p for p in prepared if p), default=None)
        if latest is not None and not all(c and _attempt_of(c) == _attempt_of(latest) for c in committed):
            self._commit(self._under_own_term(latest))  # raises StateLost if a participant cannot
        elif open_attempt is not None and all(p == open_attempt for p in prepared):
            self._commit(self._under_own_term(open_attempt))
            latest = open_attempt
        elif open_attempt is not None:
            self.abort(self._under_own_term(open_attempt))
        seen = [tag.attempt for tag in (*committed, *prepared) if tag is not None]
        return Recovered(step=latest.step if latest else None, next_attempt=max(seen, default=-1) + 1)

    def step(self, tag: StepTag, expected: Mapping[str, Sequence[MessageKey]], *, learning_rate: float) -> StepOutcome:
        """Runs one step. expected: participant -> the backward messages sent to it; a missing participant got none.

        Raises AttemptAborted if the attempt failed: call abort() and verify(), then run another attempt. Raises
        StateLost if a participant is gone, StaleRequest if a higher term has taken over, UserError if the gradients are
        not finite.
        """
        unknown = expected.keys() - self._participants.keys()
        if unknown:
            raise AttemptAborted(f"{', '.join(sorted(unknown))} got gradients and take no part")
        reduced = self._all("Reduce", lambda name, p: p.reduce(tag, expected.get(name, ())))
        self._check_incarnations({name: answer.incarnation for name, answer in reduced.items()})
        grad_norm = math.sqrt(sum(answer.square_norm for answer in reduced.values()))
        if not math.isfinite(grad_norm):
            raise UserError(
                f"step {tag.step}: the gradient norm is {grad_norm}; a lower train.lr, or train.max_grad_norm above 0, "
                "would keep it finite"
            )
        clip_scale = clip_scale_of(grad_norm, self._max_grad_norm)
        self._check_incarnations(
            self._all("Prepare", lambda _, p: p.prepare(tag, clip_scale=clip_scale, learning_rate=learning_rate))
        )
        self._commit(tag)
        return StepOutcome(grad_norm=grad_norm, clip_scale=clip_scale)

    def abort(self, tag: StepTag) -> None:
        """Aborts the attempt at all participants, ignoring errors.

        A participant that misses it drops the attempt at the first message of the next one.
        """

        def send(participant: Participant) -> MoeClusterError | None:
            try:
                participant.abort(tag)
            except MoeClusterError as exc:
                return exc
            return None

        for _ in self._pool.map(send, self._participants.values()):
            pass

    def verify(self) -> None:
        """Raises StateLost if a participant is gone or has restarted, StaleRequest if a higher term has taken over."""
        self._check_incarnations({name: status.incarnation for name, status in self._fence().items()})

    def _fence(self) -> dict[str, ExpertActorStatus]:
        """Fences all participants with this term and returns their statuses.

        Raises StateLost if a participant does not answer or has restarted.
        """
        try:
            statuses = self._all("Status", lambda _, p: p.status(self.term))
        except AttemptAborted as exc:
            raise StateLost(str(exc)) from exc
        outside = [name for name, status in statuses.items() if status.training_term != self.term]
        if outside:
            raise StateLost(f"{', '.join(outside)}: not in training under term {self.term}; started anew")
        return statuses

    def _commit(self, tag: StepTag) -> None:
        """Commits at all participants. The decision is final: raises StateLost if one of them cannot commit."""
        try:
            self._check_incarnations(self._all("Commit", lambda _, p: p.commit(tag)))
        except AttemptAborted as exc:
            raise StateLost(f"the commit of step {tag.step} did not reach everybody: {exc}") from exc
        except StaleRequest as exc:
            self.verify()  # raises StaleRequest instead if a higher term has taken over
            raise StateLost(f"the commit of step {tag.step} was refused: {exc}") from exc

    def _under_own_term(self, tag: StepTag) -> StepTag:
        return StepTag(term=self.term, step=tag.step, attempt=tag.attempt)

    def _check_incarnations(self, incarnations: Mapping[str, str]) -> None:
        for name, incarnation in incarnations.items():
            known = self._incarnations.get(name, incarnation)
            if incarnation != known:
                raise StateLost(f"{name} is not the one that it was: {incarnation} instead of {known}")

    def _all(self, request: str, call: Callable[[str, Participant], AnswerT]) -> dict[str, AnswerT]:
        """Calls all participants in parallel, retrying for repeat_s, and returns their answers by name.

        Raises the gravest of their errors; a participant that does not answer counts as AttemptAborted.
        """
        until_s = time.monotonic() + self._repeat_s

        def ask(name: str) -> AnswerT | MoeClusterError:
            while True:
                try:
                    return call(name, self._participants[name])
                except _REPEATABLE as exc:
                    if time.monotonic() + self._pause_s > until_s:
                        return AttemptAborted(f"{name} did not answer {request}: {exc}")
                    time.sleep(self._pause_s)
                except MoeClusterError as exc:
                    return exc

        answers: dict[str, AnswerT] = {}
        errors: list[MoeClusterError] = []
        for name, answer in zip(self._participants, self._pool.map(ask, self._participants), strict=True):
            if isinstance(answer, MoeClusterError):
                errors.append(answer)
            else:
                answers[name] = answer
        if errors:
            raise min(errors, key=_gravity)
        return answers


def clip_scale_of(grad_norm: float, max_grad_norm: float) -> float:
    """Returns the factor that torch.nn.utils.clip_grad_norm_ applies to gradients; 1 if max_grad_norm is 0."""
    return min(1.0, max_grad_norm / (grad_norm + 1e-6)) if max_grad_norm > 0 else 1.0


def _attempt_of(tag: StepTag) -> tuple[int, int]:
    return (tag.step, tag.attempt)


def _gravity(error: MoeClusterError) -> int:
    return next((i for i, kind in enumerate(_GRAVEST_FIRST) if isinstance(error, kind)), len(_GRAVEST_FIRST))
