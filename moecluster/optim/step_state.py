"""A participant's training state: gradients of the running attempt, prepared and committed state, and term fencing.

An expert actor has one StepState for its experts; a rank has one for its trunk. The protocol: accumulate, Reduce,
Prepare, then Commit or Abort, each tagged with (term, step, attempt).
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from moecluster.errors import AttemptAborted, StaleRequest, StateLost
from moecluster.growing import check_ahead
from moecluster.optim.gradient_sum import GradientFold, ModuleGradients
from moecluster.optim.two_phase import Tensors, TwoPhaseOptimizer
from moecluster.types import MessageKey, OptimizerSettings, StepTag


@dataclass(kw_only=True)
class _Attempt:
    """The state of an attempt until it is committed or aborted."""

    fold: GradientFold
    tag: StepTag | None = None  # None: no attempt runs
    grads: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # reduced, until prepared
    square_norm: float | None = None  # of the reduced gradients
    touched: list[TwoPhaseOptimizer] = field(default_factory=list)  # those with prepared state
    is_prepared: bool = False


class StepState:
    """The training state of a set of modules. Thread-safe.

    A parameter without a gradient in an attempt stays unchanged, as with torch.optim where `.grad` is None. This equals
    single-process training where every expert is a module. Where a family fuses all experts of a layer into one
    parameter, an expert without tokens gets a zero gradient in single-process training, so weight decay and momentum
    still change it: add such a module with `zero_when_absent`.
    """

    def __init__(self, settings: OptimizerSettings, *, ranks: int = 1, term: int = 0) -> None:
        """ranks: how many ranks send gradients. term: the highest term seen before."""
        self._settings = settings
        self._ranks = ranks
        self._modules: dict[str, Mapping[str, nn.Parameter]] = {}
        self._optimizers: dict[str, TwoPhaseOptimizer] = {}
        self._zero_when_absent: set[str] = set()
        self._lock = threading.RLock()
        self._term = term
        self._step: int | None = None  # committed; None: unknown until the first commit
        self._committed: StepTag | None = None
        self._closed: StepTag | None = None  # this attempt and older ones are committed or aborted
        self._attempt = _Attempt(fold=GradientFold(ranks))

    @property
    def term(self) -> int:
        """The highest term seen. Requests of lower terms are refused."""
        return self._term

    @property
    def step(self) -> int | None:
        """The committed step; None: unknown since the load."""
        return self._step

    @property
    def committed(self) -> StepTag | None:
        """The last committed attempt, under the tag that prepared it; None: nothing since the load."""
        return self._committed

    @property
    def prepared(self) -> StepTag | None:
        """The attempt whose prepared state is held beside the committed one, if any."""
        return self._attempt.tag if self._attempt.is_prepared else None

    @property
    def modules(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(sorted(self._modules))

    def add(
        self,
        module: str,
        parameters: Mapping[str, nn.Parameter],
        state: Mapping[str, torch.Tensor] | None = None,
        *,
        zero_when_absent: bool = False,
    ) -> None:
        """Adds a module to training, replacing an earlier one of that name.

        state: its optimizer state (`exp_avg/NAME`, ...); None: fresh. Raises CheckpointError if the state does not fit.
        """
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        optimizer = TwoPhaseOptimizer(trained, self._settings, state)
        with self._lock:
            self.remove(module)
            self._modules[module] = trained
            self._optimizers[module] = optimizer
            if zero_when_absent:
                self._zero_when_absent.add(module)

    def remove(self, module: str) -> None:
        """Removes a module from training. Ignores an unknown one."""
        with self._lock:
            self._modules.pop(module, None)
            self._optimizers.pop(module, None)
            self._zero_when_absent.discard(module)

    def reset(self, *, term: int, step: int | None) -> None:
        """Resets after a load: no attempt runs, and nothing is committed since. step: the step of the loaded state.

        If a step is given, only the next step is accepted: a request further ahead raises StateLost. Raises
        StaleRequest if the term is lower than one already seen.
        """
        with self._lock:
            self.fence(term)
            self._step = step
            self._committed = self._closed = None
            self._begin(None)

    def fence(self, term: int) -> None:
        """Refuses requests of lower terms from now on. Raises StaleRequest if a higher term was seen, InvalidMessage if
        this one is too far ahead."""
        with self._lock:
            if term < self._term:
                raise StaleRequest(f"training term {term} is superseded by term {self._term}")
            check_ahead(term, self._term, "training_term")
            self._term = term

    def admit(self, tag: StepTag) -> None:
        """Checks a request's tag. A newer attempt replaces the running one and drops its gradients and prepared state.

        Raises StaleRequest for an older term, step or attempt; StateLost if the step is not the one after the committed
        step.
        """
        with self._lock:
            self._check_numbers(tag)
            self.fence(tag.term)
            if self._step is not None and tag.step <= self._step:
                raise StaleRequest(f"step {tag.step} is over: {self._step} is committed")
            if self._step is not None and tag.step > self._step + 1:
                raise StateLost(f"this participant holds step {self._step} and was asked for step {tag.step}")
            if self._closed is not None and tag <= self._closed:
                raise StaleRequest(f"{tag} was aborted")
            running = self._attempt.tag
            if running is not None and tag < running:
                raise StaleRequest(f"{tag} is over: {running} runs")
            if tag != running:
                self._begin(tag)

    def accumulate(self, tag: StepTag, key: MessageKey, grads: ModuleGradients) -> bool:
        """Adds the gradients of one backward message and takes ownership of them. Returns False for a duplicate.

        Raises StaleRequest, StateLost; AttemptAborted if the attempt is already reduced, or a module is unknown.
        """
        with self._lock:
            self.admit(tag)
            if key in self._attempt.fold.keys:
                return False
            if self._attempt.square_norm is not None:
                raise AttemptAborted(f"{key} came after the gradients of {tag} were reduced")
            unknown = grads.keys() - self._modules.keys()
            if unknown:
                raise AttemptAborted(f"gradients of {', '.join(sorted(unknown))}, which are not trained here")
            self._attempt.fold.add(key, grads)
            return True

    def reduce(self, tag: StepTag, expected: Sequence[MessageKey]) -> float:
        """Returns the sum of squares (float64) of the attempt's gradients. Idempotent.

        Raises AttemptAborted, naming missing and unexpected messages, if the messages received are not exactly the
        expected ones.
        """
        with self._lock:
            self.admit(tag)
            attempt = self._attempt
            missing, surplus = set(expected) - attempt.fold.keys, attempt.fold.keys - set(expected)
            if missing or surplus:
                raise AttemptAborted(f"{tag}: {_difference(missing, surplus)}")
            if attempt.square_norm is None:
                attempt.grads = attempt.fold.finish()
                attempt.square_norm = _square_norm(attempt.grads)
            return attempt.square_norm

    def prepare(self, tag: StepTag, *, clip_scale: float, learning_rate: float) -> None:
        """Computes the new state beside the old one. Idempotent. Raises AttemptAborted if nothing is reduced yet."""
        with self._lock:
            self.admit(tag)
            attempt = self._attempt
            if attempt.is_prepared:
                return
            if attempt.square_norm is None:
                raise AttemptAborted(f"{tag} was not reduced here")
            for module, optimizer in self._optimizers.items():
                grads = attempt.grads.get(module)
                if grads is None and module in self._zero_when_absent:
                    grads = {name: torch.zeros_like(p) for name, p in self._modules[module].items()}
                if grads:
                    optimizer.prepare(grads, clip_scale=clip_scale, learning_rate=learning_rate)
                    attempt.touched.append(optimizer)
            attempt.fold.clear()
            attempt.grads = {}
            attempt.is_prepared = True

    def commit(self, tag: StepTag) -> None:
        """Swaps the prepared state in. Idempotent.

        The tag's term is the caller's, so that a new coordinator can commit what its predecessor prepared. Raises
        StaleRequest for an older term, or if this step and attempt are not prepared here.
        """
        with self._lock:
            self.fence(tag.term)
            if _same_attempt(self._committed, tag):
                return
            if not _same_attempt(self.prepared, tag):
                raise StaleRequest(f"{tag} is not prepared here: {self.prepared or 'nothing'} is")
            for optimizer in self._attempt.touched:
                optimizer.commit()
            self._committed = self._closed = self._attempt.tag
            self._step = tag.step
            self._begin(None)

    def abort(self, tag: StepTag) -> None:
        """Aborts the attempt and older ones, whether known here or not.

        Raises StaleRequest for an older term, or if the attempt is committed.
        """
        with self._lock:
            self._check_numbers(tag)
            self.fence(tag.term)
            if _same_attempt(self._committed, tag):
                raise StaleRequest(f"{tag} is committed")
            if self._attempt.tag is None or self._attempt.tag <= tag:
                self._begin(None)
            self._closed = max(self._closed, tag) if self._closed else tag

    def state_tensors(self, module: str) -> Tensors:
        """Returns the optimizer state of a module: `exp_avg/NAME`, ... Empty before its first step."""
        with self._lock:
            return self._optimizers[module].state()

    def _check_numbers(self, tag: StepTag) -> None:
        """Runs before the term fences, so that a refused request changes nothing. Raises InvalidMessage if the step or
        attempt is too far ahead."""
        known = [t for t in (self._committed, self._closed, self._attempt.tag) if t is not None]
        check_ahead(tag.step, max((self._step or 0, *(t.step for t in known))), "step")
        check_ahead(tag.attempt, max((t.attempt for t in known), default=0), "attempt")

    def _begin(self, tag: StepTag | None) -> None:
        """Drops the running attempt and starts another; None: starts none."""
        for optimizer in self._attempt.touched:
            optimizer.abort()
        self._attempt = _Attempt(fold=GradientFold(self._ranks), tag=tag)


def _same_attempt(ours: StepTag | None, theirs: StepTag) -> bool:
    return ours is not None and (ours.step, ours.attempt) == (theirs.step, theirs.attempt)


def _square_norm(grads: ModuleGradients) -> float:
    """Returns the sum of squares in float64, added in the order of module and parameter names."""
    total = 0.0
    for module in sorted(grads):
        for name in sorted(grads[module]):
            total += float(grads[module][name].double().square().sum())
    return total


def _difference(missing: set[MessageKey], surplus: set[MessageKey]) -> str:
    parts = [
        f"{len(keys)} {what} messages, the first {min(keys)}"
        for what, keys in (("missing", missing), ("unexpected", surplus))
        if keys
    ]
    return "; ".join(parts)
