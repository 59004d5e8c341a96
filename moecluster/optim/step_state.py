"""What takes part in training steps: gradients of the running attempt, prepared and committed state, and the fences.

An expert actor has one StepState over its experts; a rank has one over its trunk. The protocol: accumulate, Reduce,
Prepare, then Commit or Abort, each naming (term, step, attempt).
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from moecluster.errors import AttemptAborted, StaleOrder, StateLost
from moecluster.growing import check_ahead
from moecluster.optim.gradient_sum import GradientFold, ModuleGradients
from moecluster.optim.two_phase import Tensors, TwoPhaseOptimizer
from moecluster.types import MessageKey, OptimizerSettings, StepTag


@dataclass(kw_only=True)
class _Attempt:
    """What is held of an attempt until it is committed or aborted."""

    fold: GradientFold
    tag: StepTag | None = None  # None: no attempt runs
    grads: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # reduced, until prepared
    square_norm: float | None = None  # of the reduced gradients
    touched: list[TwoPhaseOptimizer] = field(default_factory=list)  # which have something prepared
    is_prepared: bool = False


class StepState:
    """The training side of some modules. Thread-safe.

    A parameter that got no gradient in an attempt is left alone, as torch.optim does where `.grad` is None. That is
    what one process does too where every expert is a module. Where a family fuses all experts of a layer in one
    parameter, an expert without tokens gets a zero gradient there, and decay and momentum move it: such a module is
    added with `zero_when_absent`.
    """

    def __init__(self, settings: OptimizerSettings, *, ranks: int = 1, term: int = 0) -> None:
        """ranks: how many ranks send gradients; it fixes the order of summing. term: the highest seen before."""
        self._settings = settings
        self._ranks = ranks
        self._modules: dict[str, Mapping[str, nn.Parameter]] = {}
        self._optimizers: dict[str, TwoPhaseOptimizer] = {}
        self._zero_when_absent: set[str] = set()
        self._lock = threading.RLock()
        self._term = term
        self._step: int | None = None  # committed; None: unknown, the first order tells
        self._committed: StepTag | None = None
        self._closed: StepTag | None = None  # this attempt and older ones are over
        self._attempt = _Attempt(fold=GradientFold(ranks))

    @property
    def term(self) -> int:
        """The highest term seen; orders of lower ones are refused."""
        return self._term

    @property
    def step(self) -> int | None:
        """The step whose state is held; None: not known since the load."""
        return self._step

    @property
    def committed(self) -> StepTag | None:
        """The attempt that was committed last, as it was prepared; None: nothing since the load."""
        return self._committed

    @property
    def prepared(self) -> StepTag | None:
        """The attempt whose new state is held beside the old."""
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
        """Puts a module under training, in place of an older one of this name.

        state: its optimizer state (`exp_avg/NAME`, ...); None starts anew. Raises CheckpointError if it does not fit.
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
        """Takes a module out of training; an unknown one is fine."""
        with self._lock:
            self._modules.pop(module, None)
            self._optimizers.pop(module, None)
            self._zero_when_absent.discard(module)

    def reset(self, *, term: int, step: int | None) -> None:
        """After a load: no attempt runs, nothing is committed since. step: what was loaded has committed it.

        With a step, only the next one is taken: an order further ahead raises StateLost. Raises StaleOrder.
        """
        with self._lock:
            self.fence(term)
            self._step = step
            self._committed = self._closed = None
            self._begin(None)

    def fence(self, term: int) -> None:
        """Refuses orders of lower terms from now on. Raises StaleOrder if this term is one, InvalidMessage if it is too
        far ahead."""
        with self._lock:
            if term < self._term:
                raise StaleOrder(f"training term {term} is over: {self._term} has the say")
            check_ahead(term, self._term, "training_term")
            self._term = term

    def admit(self, tag: StepTag) -> None:
        """Lets an order of an attempt in; a newer attempt ends the running one, its gradients and prepared state.

        Raises StaleOrder for an older term, step or attempt, StateLost if steps lie between it and what is held here.
        """
        with self._lock:
            self._check_numbers(tag)
            self.fence(tag.term)
            if self._step is not None and tag.step <= self._step:
                raise StaleOrder(f"step {tag.step} is over: {self._step} is committed")
            if self._step is not None and tag.step > self._step + 1:
                raise StateLost(f"this participant holds step {self._step} and was asked for step {tag.step}")
            if self._closed is not None and tag <= self._closed:
                raise StaleOrder(f"{tag} was aborted")
            running = self._attempt.tag
            if running is not None and tag < running:
                raise StaleOrder(f"{tag} is over: {running} runs")
            if tag != running:
                self._begin(tag)

    def accumulate(self, tag: StepTag, key: MessageKey, grads: ModuleGradients) -> bool:
        """Adds one backward message's gradients, which the caller gives away. False: it was there already.

        Raises StaleOrder, StateLost; AttemptAborted if the attempt was reduced without it.
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
        """Sum of squares (float64) of the attempt's gradients; repeated is fine.

        Raises AttemptAborted, naming what lacks or is too much, if they do not come from exactly the expected messages.
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
        """Computes the new state beside the old one; repeated is fine. Raises AttemptAborted if not reduced here."""
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
        """Swaps the prepared state in; repeated is fine.

        The tag's term is the orderer's: a successor commits what its predecessor had everybody prepare. Raises
        StaleOrder for an older term, and for a step and attempt that are not prepared here.
        """
        with self._lock:
            self.fence(tag.term)
            if _same_attempt(self._committed, tag):
                return
            if not _same_attempt(self.prepared, tag):
                raise StaleOrder(f"{tag} is not prepared here: {self.prepared or 'nothing'} is")
            for optimizer in self._attempt.touched:
                optimizer.commit()
            self._committed = self._closed = self._attempt.tag
            self._step = tag.step
            self._begin(None)

    def abort(self, tag: StepTag) -> None:
        """Ends the attempt and older ones; unknown ones are fine. Raises StaleOrder: older term, or committed."""
        with self._lock:
            self._check_numbers(tag)
            self.fence(tag.term)
            if _same_attempt(self._committed, tag):
                raise StaleOrder(f"{tag} is committed")
            if self._attempt.tag is None or self._attempt.tag <= tag:
                self._begin(None)
            self._closed = max(self._closed, tag) if self._closed else tag

    def state_tensors(self, module: str) -> Tensors:
        """Optimizer state of a module: `exp_avg/NAME`, ... Empty before its first step."""
        with self._lock:
            return self._optimizers[module].state()

    def _check_numbers(self, tag: StepTag) -> None:
        """Before the term fences: an order that is refused changes nothing. Raises InvalidMessage."""
        known = [t for t in (self._committed, self._closed, self._attempt.tag) if t is not None]
        check_ahead(tag.step, max((self._step or 0, *(t.step for t in known))), "step")
        check_ahead(tag.attempt, max((t.attempt for t in known), default=0), "attempt")

    def _begin(self, tag: StepTag | None) -> None:
        """Forgets the running attempt; None: no other begins."""
        for optimizer in self._attempt.touched:
            optimizer.abort()
        self._attempt = _Attempt(fold=GradientFold(self._ranks), tag=tag)


def _same_attempt(ours: StepTag | None, ordered: StepTag) -> bool:
    return ours is not None and (ours.step, ours.attempt) == (ordered.step, ordered.attempt)


def _square_norm(grads: ModuleGradients) -> float:
    """Sum of squares in float64, modules and parameters in the order of their names."""
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
