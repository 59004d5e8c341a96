"""A small job of training steps whose participants fail on request."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
import torch
from torch import nn

from moecluster.errors import AttemptAborted, StaleRequest, StateLost, Unavailable
from moecluster.optim.step_state import StepState
from moecluster.training.coordinator import StepCoordinator
from moecluster.types import ExpertActorStatus, MessageKey, OptimizerSettings, PlacementNumber, ReduceResult, StepTag

T = TypeVar("T")
Saved = tuple[torch.Tensor, dict[str, torch.Tensor], int]  # weight, optimizer state, step
NAMES = ("expert-0", "expert-1", "trunk")
ORDERS = ("accumulate", "reduce", "prepare", "commit", "status", "abort")
FAULTS = (
    "request lost",
    "reply lost",
    "killed before",
    "killed after",
    "coordinator dies before",
    "coordinator dies after",
)
STEPS = 4
ADAMW = OptimizerSettings(name="adamw", weight_decay=0.1)
MAX_GRAD_NORM = 0.5


class CoordinatorDied(Exception):
    """Not one of ours: nothing in the coordinator may catch it."""


@dataclass
class Member:
    """One participant: a StepState over one matrix, that can be killed and loaded again."""

    name: str
    faults: dict[tuple[str, int], str] = field(default_factory=dict)  # (order, how many before it) -> fault
    restarts: int = 0
    calls: dict[str, int] = field(default_factory=dict)

    def load(self, saved: Saved, term: int) -> None:
        weight, state, step = saved
        self.weight = nn.Parameter(weight.clone())
        self.state = StepState(ADAMW)
        self.state.add("m", {"w": self.weight}, {name: value.clone() for name, value in state.items()})
        self.state.reset(term=term, step=step)

    def save(self, step: int) -> Saved:
        assert self.state.step == step
        state = {name: value.clone() for name, value in self.state.state_tensors("m").items()}
        return self.weight.detach().clone(), state, step

    @property
    def incarnation(self) -> str:
        return f"{self.name}#{self.restarts}"

    def kill(self) -> None:
        """A new process in its place, that holds nothing."""
        self.restarts += 1
        self.state = StepState(ADAMW)

    def backward(self, tag: StepTag, micro_batch: int) -> None:
        """Gradients of this step at the present weights."""
        generator = torch.Generator().manual_seed(100 * tag.step + 10 * micro_batch + NAMES.index(self.name))
        # A test before may still be loading a model, which sets torch's default dtype for the whole process.
        target = torch.randn(self.weight.shape, generator=generator, dtype=torch.float32)
        grads = {"m": {"w": self.weight.detach() - target}}
        self._answer("accumulate", lambda: self.state.accumulate(tag, message(micro_batch), grads))

    def reduce(self, tag: StepTag, expected: Sequence[MessageKey]) -> ReduceResult:
        def order() -> ReduceResult:
            return ReduceResult(incarnation=self.incarnation, square_norm=self.state.reduce(tag, expected))

        return self._answer("reduce", order)

    def prepare(self, tag: StepTag, *, clip_scale: float, learning_rate: float) -> str:
        def order() -> str:
            self.state.prepare(tag, clip_scale=clip_scale, learning_rate=learning_rate)
            return self.incarnation

        return self._answer("prepare", order)

    def commit(self, tag: StepTag) -> str:
        def order() -> str:
            self.state.commit(tag)
            return self.incarnation

        return self._answer("commit", order)

    def abort(self, tag: StepTag) -> None:
        self._answer("abort", lambda: self.state.abort(tag))

    def status(self, training_term: int = 0) -> ExpertActorStatus:
        def order() -> ExpertActorStatus:
            if training_term and self.state.modules:
                self.state.fence(training_term)
            return ExpertActorStatus(
                actor=self.name,
                incarnation=self.incarnation,
                placement=PlacementNumber(1, 1),
                experts=(),
                hosted_bytes=0,
                weight_version=0,
                training_term=self.state.term,
                committed=self.state.committed,
                prepared=self.state.prepared,
                rss_bytes=0,
            )

        return self._answer("status", order)

    def _answer(self, order: str, act: Callable[[], T]) -> T:
        count = self.calls.get(order, 0)
        self.calls[order] = count + 1
        fault = self.faults.get((order, count), "")
        if fault == "request lost":
            raise Unavailable("the request was lost")
        if fault == "killed before":
            self.kill()
        if fault == "coordinator dies before":
            raise CoordinatorDied
        if not self.state.modules and order != "status":
            raise StateLost(f"{self.name} trains nothing")
        result = act()
        if fault == "killed after":
            self.kill()
        if fault in ("reply lost", "killed after"):
            raise Unavailable("the reply was lost")
        if fault == "coordinator dies after":
            raise CoordinatorDied
        return result


def message(micro_batch: int) -> MessageKey:
    return MessageKey(rank=0, micro_batch=micro_batch, layer=0, pass_index=0, rows=4)


EXPECTED = {name: [message(0), message(1)] for name in NAMES}


class Job:
    """What a training loop does around the coordinator, with a checkpoint after every second step."""

    def __init__(self, faults: dict[str, dict[tuple[str, int], str]] | None = None) -> None:
        self.members = {name: Member(name, (faults or {}).get(name, {})) for name in NAMES}
        self.term = 1
        self.step = 0
        self.attempt = 0
        self.replays = 0
        generator = torch.Generator().manual_seed(7)
        self.checkpoint: dict[str, Saved] = {
            name: (torch.randn(3, 2, generator=generator, dtype=torch.float32), {}, 0) for name in NAMES
        }
        self.tags: list[StepTag] = []
        self._go_back()

    def run(self) -> dict[str, torch.Tensor]:
        """The parameters after STEPS steps."""
        while self.step < STEPS:
            self.replays += 1
            assert self.replays < 60, "no end of replays"
            try:
                self._advance()
            except CoordinatorDied:
                self._stalled_coordinator_wakes_up()
                self._take_over()
            except StateLost:
                self._go_back()
        return {name: member.weight.detach() for name, member in self.members.items()}

    def _advance(self) -> None:
        tag = StepTag(term=self.term, step=self.step + 1, attempt=self.attempt)
        self.tags.append(tag)
        try:
            for micro_batch in range(2):
                for member in self.members.values():
                    self._send(member, tag, micro_batch)
            self.coordinator.step(tag, EXPECTED, learning_rate=0.1 / tag.step)
        except AttemptAborted:
            self.coordinator.abort(tag)
            self.coordinator.verify()
            self.attempt += 1
            return
        self.step, self.attempt = tag.step, 0
        if self.step % 2 == 0:
            self.checkpoint = {name: member.save(self.step) for name, member in self.members.items()}

    def _send(self, member: Member, tag: StepTag, micro_batch: int) -> None:
        """As a router does: once more to the same incarnation, then the attempt is given up."""
        for _ in range(3):
            try:
                return member.backward(tag, micro_batch)
            except Unavailable:
                continue
        raise AttemptAborted("no answer")

    def _new_coordinator(self) -> None:
        self.coordinator = StepCoordinator(
            self.members, term=self.term, max_grad_norm=MAX_GRAD_NORM, repeat_s=0.5, pause_s=0.0
        )

    def _take_over(self) -> None:
        """A successor after a crash of the coordinator, the members' states being what they are."""
        while True:
            self.coordinator.close()
            self.term += 1
            self._new_coordinator()
            try:
                recovered = self.coordinator.recover()
            except CoordinatorDied:
                continue
            except StateLost:
                return self._go_back()
            self.step = self.step if recovered.step is None else recovered.step
            self.attempt = recovered.next_attempt
            if self.step % 2 == 0:
                self.checkpoint = {name: member.save(self.step) for name, member in self.members.items()}
            return None

    def _go_back(self) -> None:
        """All load the last complete checkpoint."""
        while True:
            self.term += 1
            for name, member in self.members.items():
                member.load(self.checkpoint[name], self.term)
            self._new_coordinator()
            try:
                self.coordinator.recover()
            except (StateLost, CoordinatorDied):
                continue
            self.step, self.attempt = next(iter(self.checkpoint.values()))[2], 0
            return

    def _stalled_coordinator_wakes_up(self) -> None:
        """Between fence and recovery of a successor, an old coordinator's orders arrive late, at some members only."""
        for member in self.members.values():
            if not member.state.modules:
                continue  # started anew, it refuses whatever comes
            member.state.fence(self.term + 1)
            for tag in self.tags[-3:]:
                for order in (member.state.commit, member.state.abort):
                    with pytest.raises(StaleRequest):
                        order(tag)
        self.term += 1
