"""Continuous batching: each step computes one token of every running sequence, and parts of new prompts."""

import threading
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from moecluster.dispatch.trunk_backend import TrunkBackend
from moecluster.errors import MoeClusterError, Unavailable
from moecluster.hf.continuous_batching import BatchRows, PagedBatches, PagedLimits
from moecluster.router.engine.batch_errors import batch_error, errors_by_sequence, sequence_error
from moecluster.router.engine.engine import EngineLimits, OnEnd, OnFailure
from moecluster.router.engine.expert_counts import ExpertCounts
from moecluster.router.engine.sampler import SampledToken, sample_tokens
from moecluster.router.engine.sequence import TokenSequence


class ContinuousBatchRunner:
    """A BatchRunner over transformers' paged cache. Its batches call the hooks from their own thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        experts: TrunkBackend,
        limits: EngineLimits,
        on_end: OnEnd,
        on_failure: OnFailure,
    ) -> None:
        """experts: the model's backend."""
        self.max_tokens = limits.max_cached_tokens
        self._experts = experts
        self._on_end, self._on_failure = on_end, on_failure
        self._sequences: dict[str, TokenSequence] = {}
        self._counts = ExpertCounts()
        self._lock = threading.Lock()
        self._broken: tuple[Exception, MoeClusterError] | None = (
            None  # what ended a batch, and the error for its sequences
        )
        self._spoilt: dict[str, MoeClusterError] = {}  # sequences with failed rows in the current forward pass
        self._left: list[str] = []  # cancelled; the counting thread removes them
        self._batches = PagedBatches(
            model,
            PagedLimits(
                max_cached_tokens=limits.max_cached_tokens,
                max_batch_tokens=limits.max_batch_tokens,
                max_sequences=limits.max_running,
            ),
            self,
        )

    def add(self, sequence: TokenSequence) -> None:
        with self._lock:
            self._sequences[sequence.key] = sequence
        self._batches.add(sequence.key, sequence.ids)

    def cancel(self, sequence: TokenSequence) -> None:
        with self._lock:
            if self._sequences.pop(sequence.key, None) is None:
                return
            self._left.append(sequence.key)
        self._batches.cancel(sequence.key)

    def is_alive(self) -> bool:
        return self._batches.is_running()

    def close(self, timeout_s: float) -> None:
        self._batches.close(timeout_s)

    # -- called by the batches' thread --

    def begin_batch(self, rows: Sequence[BatchRows]) -> None:
        self._experts.watch(self)
        self._spoilt = {}
        with self._lock:
            left, self._left = self._left, []
        for name in left:
            self._counts.leave(name)
        for row in rows:
            sequence = self._sequences.get(row.name)
            if sequence is not None:
                self._counts.enter(row.name)
                sequence.computing(cached_tokens=row.cached_tokens)
        self._counts.begin_rows([(row.name, row.num_rows) for row in rows])

    def see(self, layer: int, ids_TK: npt.NDArray[np.int64], num_experts: int) -> npt.NDArray[np.bool_] | None:
        """Counts the expert assignments of each sequence; all rows are computed."""
        self._counts.add(layer, ids_TK, num_experts)
        return None

    def lost(self, layer: int, num_rows: int, reasons: Mapping[int, str]) -> None:
        """Ends the sequences of these rows after the forward pass; the rows of all others are intact."""
        self._spoilt |= errors_by_sequence(self._counts, num_rows, reasons)

    def spoilt(self) -> Collection[str]:
        return self._spoilt.keys()

    def choose(self, names: Sequence[str], logits_BV: torch.Tensor) -> Sequence[tuple[int, bool]]:
        for name, error in self._spoilt.items():
            spoilt = self._sequences.get(name)
            if spoilt is not None:
                self._end_alone(spoilt, error)
            self._batches.cancel(name)  # a part of its prompt may still be due
        with self._lock:
            sequences = [self._sequences.get(name) for name in names]
        there = [sequence for sequence in sequences if sequence is not None]
        if len(there) < len(sequences):  # some were cancelled meanwhile
            logits_BV = logits_BV[[row for row, sequence in enumerate(sequences) if sequence is not None]]
        tokens = iter(sample_tokens(there, logits_BV))
        return [(0, True) if sequence is None else self._push(sequence, next(tokens)) for sequence in sequences]

    def failed(self, name: str, error: Exception, computed: Sequence[str]) -> None:
        sequence = self._forget(name)
        if sequence is None:
            return
        if name not in computed:
            if computed:
                error = Unavailable("a batch of other sequences failed")
            if isinstance(error, Unavailable):  # or the batches were closed
                self._on_failure(sequence, error)
                return
        broken = self._broken
        if broken is None or broken[0] is not error:
            broken = self._broken = error, batch_error(error, len(computed))
        self._on_failure(sequence, broken[1])

    def _push(self, sequence: TokenSequence, token: SampledToken | MoeClusterError) -> tuple[int, bool]:
        """Returns (token id, whether the sequence has ended). An error ends only this sequence."""
        try:
            if isinstance(token, MoeClusterError):
                raise token
            is_last = sequence.push(token)
            if is_last and self._forget(sequence.key) is not None:
                self._on_end(sequence, self._counts.leave(sequence.key))
            return token.id, is_last
        except MoeClusterError as exc:
            self._end_alone(sequence, exc)
        except Exception as exc:
            self._end_alone(sequence, sequence_error(sequence.name, exc, "adding a token"))
        return 0, True

    def _end_alone(self, sequence: TokenSequence, error: MoeClusterError) -> None:
        self._forget(sequence.key)
        self._counts.leave(sequence.key)
        self._on_failure(sequence, error)

    def _forget(self, name: str) -> TokenSequence | None:
        with self._lock:
            return self._sequences.pop(name, None)
