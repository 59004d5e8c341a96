"""A rank's trunk as a participant in training steps, like an expert actor."""

import secrets
from collections.abc import Sequence

import torch
from torch import nn

from moecluster.memory import ResidentMemory
from moecluster.models.checkpoint.training_progress import TrainingState
from moecluster.models.trunk import trunk_parameters
from moecluster.optim.step_state import StepState
from moecluster.types import NO_PLACEMENT, ExpertActorStatus, MessageKey, OptimizerSettings, ReduceResult, StepTag

MODULE = "trunk"
NO_LAYER = -1  # layer in the message keys of trunk gradients


class TrunkParticipant:
    """Implements optim.participant.Participant."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerSettings,
        *,
        state: TrainingState,
        optimizer_state: dict[str, torch.Tensor] | None,
        term: int,
        rank: int = 0,
    ) -> None:
        """Raises CheckpointError if the optimizer state does not fit the model."""
        self.name = f"trunk-{rank}"
        self.incarnation = secrets.token_hex(8)
        self._rank = rank
        self._memory = ResidentMemory()
        self._parameters = dict(trunk_parameters(model))
        self._sent: list[MessageKey] = []  # in the running attempt
        self._tag: StepTag | None = None
        self._state = StepState(optimizer, term=term)
        self._state.add(MODULE, self._parameters, optimizer_state)
        self._state.reset(term=term, step=state.step)

    def accumulate(self, tag: StepTag, *, micro_batch: int, rows: int) -> None:
        """Moves the gradients of a backward pass out of the parameters. rows: tokens of the micro-batch."""
        if tag != self._tag:
            self._tag, self._sent = tag, []
        key = MessageKey(rank=self._rank, micro_batch=micro_batch, layer=NO_LAYER, pass_index=0, rows=rows)
        grads = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        self.drop_gradients()
        self._state.accumulate(tag, key, {MODULE: grads})
        self._sent.append(key)

    def drop_gradients(self) -> None:
        """Clears the gradients that an unfinished backward pass left in the parameters."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def sent(self, tag: StepTag) -> list[MessageKey]:
        """Returns the message keys that Reduce must expect from this trunk."""
        return list(self._sent) if tag == self._tag else []

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Returns `STATE/PARAMETER` -> tensor."""
        return self._state.state_tensors(MODULE)

    def reduce(self, tag: StepTag, expected: Sequence[MessageKey]) -> ReduceResult:
        return ReduceResult(incarnation=self.incarnation, square_norm=self._state.reduce(tag, expected))

    def prepare(self, tag: StepTag, *, clip_scale: float, learning_rate: float) -> str:
        self._state.prepare(tag, clip_scale=clip_scale, learning_rate=learning_rate)
        return self.incarnation

    def commit(self, tag: StepTag) -> str:
        self._state.commit(tag)
        return self.incarnation

    def abort(self, tag: StepTag) -> None:
        self.drop_gradients()
        self._state.abort(tag)

    def status(self, training_term: int = 0) -> ExpertActorStatus:
        if training_term:
            self._state.fence(training_term)
        return ExpertActorStatus(
            actor=self.name,
            incarnation=self.incarnation,
            placement=NO_PLACEMENT,
            experts=(),
            hosted_bytes=sum(p.numel() * p.element_size() for p in self._parameters.values()),
            weight_version=0,
            training_term=self._state.term,
            committed=self._state.committed,
            prepared=self._state.prepared,
            rss_bytes=self._memory.size_bytes(),
        )
