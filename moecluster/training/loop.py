"""A training run: steps, evaluations, checkpoints, and rollback when state is lost. It yields events."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from moecluster.config import Config
from moecluster.dispatch.remote_experts import RemoteExperts
from moecluster.errors import AttemptAborted, CheckpointError, MoeClusterError, StaleRequest, StateLost, UserError
from moecluster.metrics import Metrics
from moecluster.models.checkpoint.training_progress import TrainingState
from moecluster.models.experts.layout import ExpertLayout
from moecluster.placement.names import layer_balancedness
from moecluster.rpc.expert.interface import ExportedTensor
from moecluster.rpc.expert.requests import LoadRequest
from moecluster.training.checkpoint_store import CHECKPOINTS, CheckpointStore
from moecluster.training.checkpoint_writer import CheckpointContent, fill_checkpoint
from moecluster.training.data import TextData
from moecluster.training.evaluation import evaluate
from moecluster.training.events import (
    AttemptFailed,
    CheckpointFailed,
    CheckpointWritten,
    Evaluated,
    Event,
    Started,
    StepDone,
    WentBack,
)
from moecluster.training.gradients import Computed, compute_gradients, update_gates
from moecluster.training.schedule import WarmupCosine
from moecluster.training.session import Session, open_session, optimizer_settings
from moecluster.training.setup import fixed_settings
from moecluster.types import ExpertId, StepTag

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 10  # at one step, with all participants alive


class TrainingLoop:
    """One run over expert actors that are already up. Iterate over run() to train and receive events."""

    def __init__(
        self,
        config: Config,
        remote: RemoteExperts,
        *,
        start: Path,
        data: TextData,
        tokenizer: PreTrainedTokenizerBase,
        announce: Callable[[str], None] = lambda checkpoint: None,
        metrics: Metrics | None = None,
    ) -> None:
        """start: the result of prepare_start. announce: tells the controller which checkpoint to load lost experts
        from."""
        self._config = config
        self._remote = remote
        self._start = start
        self._data = data
        self._tokenizer = tokenizer
        self._announce = announce
        self._metrics = metrics
        self._store = CheckpointStore(Path(config.train.output_dir) / CHECKPOINTS)
        train = config.train
        self._schedule = WarmupCosine(
            lr=train.lr, steps=train.steps, warmup_steps=train.warmup_steps, min_lr_ratio=train.min_lr_ratio
        )
        self._session: Session | None = None
        self._step = 0  # committed
        self._position = 0  # sequences drawn

    @property
    def session(self) -> Session:
        """The current session; available from the first event on."""
        assert self._session is not None, "the run has not begun"
        return self._session

    def run(self) -> Iterator[Event]:
        """Trains up to train.steps.

        Raises UserError; StateLost under durability none, or if the actors do not come back; StaleRequest if another
        run has taken over the same experts; AttemptAborted if a step fails MAX_ATTEMPTS times; DeadlineExceeded if the
        actors do not answer an evaluation.
        """
        self._open(self._start)
        yield Started(
            step=self._step,
            steps=self._config.train.steps,
            unigram_bits_per_byte=self._data.unigram_bits_per_byte,
            bytes_per_token=self._data.bytes_per_token,
        )
        evaluated_step = -1
        while True:
            try:
                if self._evaluation_is_due() and evaluated_step != self._step:
                    yield self._evaluate()
                    evaluated_step = self._step
                if self._step >= self._config.train.steps:
                    return
                yield from self._take_step()
                if self._checkpoint_is_due():
                    yield self._write_checkpoint()
            except StateLost as error:
                yield self._go_back(error)
                evaluated_step = -1

    def hand_over(self) -> None:
        """Reloads the experts from the last checkpoint for serving: without optimizer state, weights packed.

        Raises a MoeClusterError if an actor does not answer. That actor then serves its trained weights, or nothing.
        """
        checkpoint = self._store.latest()
        if checkpoint is None:
            return
        session = self.session
        for actor, control in session.controls.items():
            control.load(
                LoadRequest(
                    term=session.placement.term,
                    experts=session.placement.experts_on(actor),
                    checkpoint=str(checkpoint.resolve()),
                    dtype=self._config.model.dtype,
                    replace=True,
                    timeout_s=self._config.cluster.start_timeout_s,
                )
            )

    def close(self) -> None:
        """Ends the coordinator's threads. The actors keep their experts."""
        if self._session is not None:
            self._session.coordinator.close()

    # -- a step --

    def _take_step(self) -> Iterator[Event]:
        """Commits one step, in up to MAX_ATTEMPTS attempts. Raises StateLost; AttemptAborted if all attempts fail."""
        train = self._config.train
        started_s = time.perf_counter()
        ids_BS = self._data.train_batch(self._position, train.batch_size)
        learning_rate = self._schedule.at(self._step + 1)
        for attempt in range(MAX_ATTEMPTS):
            tag = StepTag(term=self.session.term, step=self._step + 1, attempt=attempt)
            try:
                computed = compute_gradients(
                    self.session, self._remote, tag, ids_BS, micro_batches=train.micro_batches, seed=train.seed
                )
                expected = {**self._remote.sent(tag), self.session.trunk.name: self.session.trunk.sent(tag)}
                outcome = self.session.coordinator.step(tag, expected, learning_rate=learning_rate)
            except (UserError, StateLost):
                raise
            except MoeClusterError as error:
                self.session.coordinator.abort(tag)
                self.session.coordinator.verify()
                if self._metrics is not None:
                    self._metrics.count_replay()
                yield AttemptFailed(step=tag.step, attempt=attempt, reason=str(error))
                continue
            finally:
                self._remote.forget(tag)
            update_gates(self.session.model, computed.loads)
            self._step, self._position = tag.step, self._position + train.batch_size
            seconds = time.perf_counter() - started_s
            if self._metrics is not None:
                self._metrics.observe_train_step(loss=computed.loss, aux_losses=computed.aux_losses, seconds=seconds)
            yield StepDone(
                step=self._step,
                loss=computed.loss,
                aux_losses=computed.aux_losses,
                learning_rate=learning_rate,
                grad_norm=outcome.grad_norm,
                seconds=seconds,
                tokens_per_s=ids_BS.numel() / seconds,
                balancedness=self._balancedness(computed),
                attempts=attempt + 1,
            )
            return
        raise AttemptAborted(f"step {self._step + 1} failed {MAX_ATTEMPTS} times with all participants alive")

    def _balancedness(self, computed: Computed) -> float | None:
        tokens = {
            ExpertId(layer=layer, index=index): int(count)
            for layer, counts_E in computed.loads.items()
            for index, count in enumerate(counts_E)
        }
        layers = layer_balancedness(self.session.placement, tokens)
        return sum(layers.values()) / len(layers) if layers else None

    # -- evaluation --

    def _evaluation_is_due(self) -> bool:
        train = self._config.train
        every = train.eval_every_steps
        return self._step >= train.steps or (every > 0 and self._step % every == 0)

    def _evaluate(self) -> Evaluated:
        """Raises StateLost if an actor restarted meanwhile, since it may have served older weights."""
        train = self._config.train
        try:
            evaluation = evaluate(
                self.session.model,
                self._data,
                windows=train.eval_batches * train.batch_size,
                batch_size=train.batch_size // train.micro_batches,
            )
        finally:
            self.session.coordinator.verify()
        return Evaluated(step=self._step, bits_per_byte=evaluation.bits_per_byte, domains=evaluation.domains)

    # -- checkpoints --

    def _checkpoint_is_due(self) -> bool:
        train = self._config.train
        every = train.checkpoint_every_steps
        return self._step >= train.steps or (every > 0 and self._step % every == 0)

    def _write_checkpoint(self) -> CheckpointWritten | CheckpointFailed:
        """Raises StateLost; CheckpointError if writing fails and train.checkpoint_errors is "stop"."""
        started_s = time.perf_counter()
        try:
            path = self._store.write(self._step, lambda directory: fill_checkpoint(directory, self._content()))
        except CheckpointError as error:
            if self._config.train.checkpoint_errors == "stop":
                raise
            return CheckpointFailed(step=self._step, reason=str(error))
        except StaleRequest as error:
            self.session.coordinator.verify()
            raise StateLost(f"the experts are not at step {self._step}: {error}") from error
        except MoeClusterError as error:  # an actor died while sending its experts
            self.session.coordinator.verify()
            raise StateLost(f"the experts could not be read at step {self._step}: {error}") from error
        try:
            self._announce(str(path.resolve()))
            self._store.prune(self._config.train.keep_checkpoints)
        except MoeClusterError as error:  # the controller may still load lost experts from an older one: keep all
            logger.warning("the controller does not know of %s: %s", path, error)
        return CheckpointWritten(step=self._step, path=str(path), seconds=time.perf_counter() - started_s)

    def _content(self) -> CheckpointContent:
        session = self.session
        return CheckpointContent(
            state=TrainingState(
                step=self._step,
                data_position=self._position,
                term=session.term,
                settings=fixed_settings(self._config),
            ),
            trunk=session.model,
            tokenizer=self._tokenizer,
            layout=ExpertLayout(session.model.config),
            expert_dtype=getattr(torch, self._config.model.dtype),
            export=self._export,
            optimizer=optimizer_settings(self._config),
            trunk_optimizer=session.trunk.optimizer_state(),
            carried_from=self._store.latest() or self._start,
        )

    def _export(self, experts: Sequence[ExpertId]) -> Iterator[ExportedTensor]:
        for actor, control in self.session.controls.items():
            held = set(self.session.placement.experts_on(actor))
            here = [expert for expert in experts if expert in held]
            if here:
                yield from control.export(experts=here, with_optimizer=True, step=self._step)

    # -- rollback --

    def _go_back(self, error: StateLost) -> WentBack:
        """Reloads everything from the last complete checkpoint. Re-raises the error under durability none."""
        if self._config.train.durability == "none":
            raise error
        started_s, from_step = time.perf_counter(), self._step
        self._open(self._store.latest() or self._start)
        return WentBack(
            from_step=from_step, step=self._step, reason=str(error), seconds=time.perf_counter() - started_s
        )

    def _open(self, checkpoint: Path) -> None:
        self.close()
        self._session = None  # frees its trunk before the next one is loaded
        self._session = open_session(self._remote, checkpoint, self._config)
        self._step, self._position = self._session.state.step, self._session.state.data_position
