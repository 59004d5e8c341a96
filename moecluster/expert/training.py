"""The training side of an expert actor: activations between forward and backward, gradients, prepared state."""

from collections.abc import Mapping

import torch
from torch import nn

from moecluster.errors import StaleRequest, StateLost
from moecluster.expert import compute
from moecluster.expert.activations import KeptActivations
from moecluster.growing import MAX_AHEAD_AT_START, check_ahead
from moecluster.hf.shard import ExpertShard
from moecluster.optim.step_state import StepState
from moecluster.types import ComputeBatch, ComputeResult, ExpertId, MessageKey, OptimizerSettings, Phase, StepTag


class ExpertTraining:
    """Trains nothing before begin(). The owner calls methods that change state under its own lock."""

    def __init__(self, actor: str, activation_budget_bytes: int) -> None:
        self._actor = actor
        self._kept = KeptActivations(activation_budget_bytes)
        self._state: StepState | None = None

    @property
    def has_begun(self) -> bool:
        return self._state is not None

    def check_begun(self) -> None:
        """Raises StateLost where nothing is trained."""
        if self._state is None:
            raise StateLost(f"{self._actor} trains nothing: it was restarted, or training never began there")

    @property
    def state(self) -> StepState:
        """Raises StateLost where nothing is trained."""
        self.check_begun()
        assert self._state is not None
        return self._state

    def check_term(self, term: int) -> None:
        """Raises InvalidMessage for a training term too far ahead."""
        known = self._state.term if self._state is not None else 0
        check_ahead(term, known, "training_term", most=MAX_AHEAD_AT_START)

    def begin(self, optimizer: OptimizerSettings, term: int, step: int | None) -> None:
        """Begins after a committed step (None: the first request says which); a newer term resets. Raises
        StaleRequest."""
        if self._state is not None and self._state.term == term:
            return
        self.check_term(term)
        if self._state is not None and term < self._state.term:
            raise StaleRequest(f"training term {term} is superseded by term {self._state.term}")
        state = StepState(optimizer, term=term)
        state.reset(term=term, step=step)
        self._kept.forget()
        self._state = state

    def holds(self, expert: ExpertId) -> bool:
        return self._state is not None and str(expert) in self._state.modules

    def add(self, expert: ExpertId, module: nn.Module, optimizer_state: Mapping[str, torch.Tensor] | None) -> None:
        """Adds an expert to training; without optimizer_state its optimizer starts fresh. Raises CheckpointError."""
        self.state.add(
            str(expert),
            dict(module.named_parameters()),
            optimizer_state,
            # Where a family fuses a layer's experts into one parameter, an expert without tokens gets a zero gradient.
            zero_when_absent=isinstance(module, ExpertShard),
        )

    def remove(self, expert: ExpertId) -> None:
        """Removes an expert from training; ignores an unknown one."""
        if self._state is not None:
            self._state.remove(str(expert))

    def compute(self, experts: Mapping[int, nn.Module], batch: ComputeBatch, run: compute.RunExpert) -> ComputeResult:
        """Runs one training forward or backward over the layer's experts by index."""
        tag = batch.train
        assert tag is not None, "decode_batch gives every training message a tag"
        self.state.admit(tag.step)
        key = (tag, batch.layer)
        if batch.phase is Phase.TRAIN_FORWARD:
            result, activations = compute.train_forward(experts, batch, run)
            self._kept.keep(key, activations)
            return result
        kept = self._kept.take(key)
        if kept is None:
            _, kept = compute.train_forward(experts, batch, run)
        result, grads = compute.backward(experts, batch, kept)
        message = MessageKey(
            rank=tag.rank,
            micro_batch=tag.micro_batch,
            layer=batch.layer,
            pass_index=tag.pass_index,
            rows=len(batch.x_ND),
        )
        named = {str(ExpertId(layer=batch.layer, index=index)): g for index, g in grads.items()}
        self.state.accumulate(tag.step, message, named)
        return result

    def commit(self, tag: StepTag) -> None:
        self.state.commit(tag)
        self._kept.forget(tag)

    def abort(self, tag: StepTag) -> None:
        """Drops an attempt's gradients and activations; does nothing if training has not begun."""
        if self._state is not None:
            self._state.abort(tag)
        self._kept.forget(tag)

    def state_tensors(self, expert: ExpertId) -> dict[str, torch.Tensor]:
        """Copies of an expert's optimizer state."""
        return {name: value.clone() for name, value in self.state.state_tensors(str(expert)).items()}
