"""Static batching: padded batches by transformers' `generate()`, for families that continuous batching cannot serve.

A sequence waits until a thread is free and starts together with the other waiting ones. Rows of padding, and of
sequences that have ended, are not sent to experts.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from moecluster.dispatch.trunk_backend import TrunkBackend
from moecluster.errors import MoeClusterError, Unavailable
from moecluster.hf.chosen_logits import chosen_logits
from moecluster.hf.padding import sees_padding
from moecluster.hf.trial import without_generation_settings
from moecluster.router.engine.batch_errors import batch_error, errors_by_sequence, sequence_error
from moecluster.router.engine.engine import EngineLimits, OnEnd, OnFailure
from moecluster.router.engine.expert_counts import ExpertCounts
from moecluster.router.engine.sampler import SampledToken, sample_tokens
from moecluster.router.engine.sequence import TokenSequence

NUM_THREADS = 2  # batches at once: a new request need not wait until the running batch ends
GROWTH_TOKENS = 256  # room for each sequence of a new batch; those that need more then continue in smaller batches
PAD_ID = 0
NOBODYS = ""  # owner of rows that no sequence needs


class StaticBatchRunner:
    """A BatchRunner over `generate()`."""

    def __init__(
        self,
        model: PreTrainedModel,
        experts: TrunkBackend,
        limits: EngineLimits,
        on_end: OnEnd,
        on_failure: OnFailure,
    ) -> None:
        """experts: the model's backend."""
        self._max_batch = max(limits.max_running // NUM_THREADS, 1)
        self.max_tokens = limits.max_cached_tokens // NUM_THREADS
        self._model = without_generation_settings(model)
        self._equal_lengths = sees_padding(model.config)
        self._experts = experts
        self._on_end, self._on_failure = on_end, on_failure
        self._waiting: deque[TokenSequence] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"padded-{i}", daemon=True) for i in range(NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, sequence: TokenSequence) -> None:
        with self._changed:
            if self._closed:
                raise Unavailable("the batches have ended")
            self._waiting.append(sequence)
            self._changed.notify()

    def cancel(self, sequence: TokenSequence) -> None:
        with self._changed:
            if sequence in self._waiting:
                self._waiting.remove(sequence)

    def is_alive(self) -> bool:
        return not self._closed

    def close(self, timeout_s: float) -> None:
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self) -> None:
        while batch := self._next_batch():
            running = _Batch(batch, self._experts, self._on_end, self._on_failure, max_tokens=self.max_tokens)
            try:
                running.run(self._model, lambda: self._closed)
                self._requeue(running.unfinished())
            except Exception as exc:  # whatever a model raises ends these sequences, not the thread
                left = running.unfinished()
                error = batch_error(exc, len(left))
                for sequence in left:
                    self._on_failure(sequence, error)

    def _requeue(self, sequences: Sequence[TokenSequence]) -> None:
        """Puts the sequences of a batch that ran out of room at the head of the queue, to continue in smaller ones."""
        with self._changed:
            if not self._closed:
                self._waiting.extendleft(reversed(sequences))
                self._changed.notify()

    def _next_batch(self) -> list[TokenSequence]:
        """Waits for sequences and returns those that fit into a batch, in order; [] once closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()  # for add() or close()
            batch: list[TokenSequence] = []
            for sequence in tuple(self._waiting):
                if len(batch) == self._max_batch:
                    break
                if self._equal_lengths and batch and len(sequence.ids) != len(batch[0].ids):
                    continue
                longest = max(min(each.max_ids, len(each.ids) + GROWTH_TOKENS) for each in (*batch, sequence))
                if batch and longest * (len(batch) + 1) > self.max_tokens:
                    break
                self._waiting.remove(sequence)
                batch.append(sequence)
            return batch


class _Batch:
    """One call of generate(). Satisfies RowWatcher."""

    def __init__(
        self,
        sequences: Sequence[TokenSequence],
        experts: TrunkBackend,
        on_end: OnEnd,
        on_failure: OnFailure,
        *,
        max_tokens: int,
    ) -> None:
        """max_tokens: of all rows together, padding included; a single sequence is generated in any case."""
        self._sequences = sequences
        self._max_tokens = max_tokens
        self._experts = experts
        self._on_end, self._on_failure = on_end, on_failure
        self._counts = ExpertCounts()
        self._ended: set[str] = set()
        self._spoilt: dict[str, MoeClusterError] = {}  # sequences with failed rows in the current forward pass

    def run(self, model: Any, is_closed: Callable[[], bool]) -> None:
        """model: a PreTrainedModel with transformers' GenerationMixin."""
        length = max(len(sequence.ids) for sequence in self._sequences)
        rows = [(*[PAD_ID] * (length - len(sequence.ids)), *sequence.ids) for sequence in self._sequences]
        mask = [[0] * (length - len(sequence.ids)) + [1] * len(sequence.ids) for sequence in self._sequences]
        for sequence in self._sequences:
            sequence.computing(cached_tokens=0)
            self._counts.enter(sequence.key)
        self._counts.begin_rows(
            [
                owner
                for sequence in self._sequences
                for owner in ((NOBODYS, length - len(sequence.ids)), (sequence.key, len(sequence.ids)))
            ]
        )
        self._experts.watch(self)
        with torch.no_grad():
            model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=GenerationConfig(
                    max_new_tokens=max(sequence.max_ids - len(sequence.ids) for sequence in self._sequences),
                    do_sample=False,
                    eos_token_id=None,  # each sequence decides its end, and samples by its own parameters
                    pad_token_id=PAD_ID,
                ),
                logits_processor=LogitsProcessorList([_Choice(self)]),
                stopping_criteria=StoppingCriteriaList([_Ends(self, is_closed)]),
            )

    def see(self, layer: int, ids_TK: npt.NDArray[np.int64], num_experts: int) -> npt.NDArray[np.bool_] | None:
        """Counts the expert assignments of each sequence. Returns which rows to compute; None: all."""
        owned_T = self._counts.owned_T
        self._counts.add(layer, ids_TK, num_experts)
        return owned_T if len(owned_T) == len(ids_TK) and not owned_T.all() else None

    def lost(self, layer: int, num_rows: int, reasons: Mapping[int, str]) -> None:
        """Ends the sequences of these rows before their next token; the rows of all others are intact."""
        self._spoilt |= errors_by_sequence(self._counts, num_rows, reasons)

    def choose(self, scores_BV: torch.Tensor) -> torch.Tensor:
        spoilt, self._spoilt = self._spoilt, {}
        for sequence in self._sequences:
            if sequence.key in spoilt and sequence.key not in self._ended:
                self._fail(sequence, spoilt[sequence.key])
        rows = [row for row, sequence in enumerate(self._sequences) if sequence.key not in self._ended]
        tokens = sample_tokens([self._sequences[row] for row in rows], scores_BV[rows])
        for row, token in zip(rows, tokens, strict=True):
            self._push(self._sequences[row], token)
        self._counts.begin_rows([(NOBODYS if t.key in self._ended else t.key, 1) for t in self._sequences])
        ids = [token.id if isinstance(token, SampledToken) else PAD_ID for token in tokens]
        return chosen_logits(scores_BV, zip(rows, ids, strict=True))

    def _push(self, sequence: TokenSequence, token: SampledToken | MoeClusterError) -> None:
        """Adds a token. An error ends only this sequence."""
        try:
            if isinstance(token, MoeClusterError):
                self._fail(sequence, token)
            elif sequence.push(token):
                self._ended.add(sequence.key)
                self._on_end(sequence, self._counts.leave(sequence.key))
        except Exception as exc:
            self._fail(sequence, sequence_error(sequence.name, exc, "adding a token"))

    def _fail(self, sequence: TokenSequence, error: MoeClusterError) -> None:
        self._ended.add(sequence.key)
        self._counts.leave(sequence.key)
        self._on_failure(sequence, error)

    def ends(self, length: int) -> list[bool]:
        """Which rows need no further token; all, if there is no room for longer ones."""
        if len(self._sequences) > 1 and len(self._sequences) * (length + 1) > self._max_tokens:
            return [True] * len(self._sequences)
        return [sequence.key in self._ended for sequence in self._sequences]

    def unfinished(self) -> list[TokenSequence]:
        """Sequences that continue in another batch."""
        return [sequence for sequence in self._sequences if sequence.key not in self._ended and not sequence.is_over]


class _Choice(LogitsProcessor):
    def __init__(self, batch: _Batch) -> None:
        self._batch = batch

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen: torch.FloatTensor = self._batch.choose(scores)  # type: ignore[assignment]
        return chosen


class _Ends(StoppingCriteria):
    def __init__(self, batch: _Batch, is_closed: Callable[[], bool]) -> None:
        self._batch = batch
        self._is_closed = is_closed

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        ends = [True] * len(input_ids) if self._is_closed() else self._batch.ends(input_ids.shape[1])
        stop: torch.BoolTensor = torch.tensor(ends, device=input_ids.device)  # type: ignore[assignment]
        return stop
