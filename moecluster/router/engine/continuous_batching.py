"""Texts written by continuous batching: each step computes a token of every running text, and parts of new prompts."""

import threading
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from moecluster.dispatch.trunk_backend import TrunkExperts
from moecluster.errors import MoeClusterError, Unavailable
from moecluster.hf.continuous_batching import BatchRows, PagedBatches, PagedLimits
from moecluster.router.engine.batch_errors import batch_error, errors_of_texts, text_error
from moecluster.router.engine.engine import EngineLimits, OnEnd, OnFailure
from moecluster.router.engine.expert_counts import ExpertCounts
from moecluster.router.engine.sampler import ChosenToken, choose_tokens
from moecluster.router.engine.sequence import RunningText


class PagedWriter:
    """A Writer, and the hooks of its batches."""

    def __init__(
        self,
        model: PreTrainedModel,
        experts: TrunkExperts,
        limits: EngineLimits,
        on_end: OnEnd,
        on_failure: OnFailure,
    ) -> None:
        """experts: the model's backend."""
        self.max_tokens = limits.max_cached_tokens
        self._experts = experts
        self._on_end, self._on_failure = on_end, on_failure
        self._texts: dict[str, RunningText] = {}
        self._counts = ExpertCounts()
        self._lock = threading.Lock()
        self._broken: tuple[Exception, MoeClusterError] | None = None  # what ended a batch, and what its texts are told
        self._spoilt: dict[str, MoeClusterError] = {}  # texts of the forward pass that is on, and what is wrong
        self._left: list[str] = []  # cancelled, to be forgotten by the thread that counts
        self._batches = PagedBatches(
            model,
            PagedLimits(
                max_cached_tokens=limits.max_cached_tokens,
                max_batch_tokens=limits.max_batch_tokens,
                max_texts=limits.max_running,
            ),
            self,
        )

    def write(self, text: RunningText) -> None:
        with self._lock:
            self._texts[text.name] = text
        self._batches.add(text.name, text.ids)

    def cancel(self, text: RunningText) -> None:
        with self._lock:
            if self._texts.pop(text.name, None) is None:
                return
            self._left.append(text.name)
        self._batches.cancel(text.name)

    def is_alive(self) -> bool:
        return self._batches.is_running()

    def close(self, timeout_s: float) -> None:
        self._batches.close(timeout_s)

    # -- what the batches' thread calls --

    def begin_batch(self, rows: Sequence[BatchRows]) -> None:
        self._experts.watch(self)
        self._spoilt = {}
        with self._lock:
            left, self._left = self._left, []
        for name in left:
            self._counts.leave(name)
        for row in rows:
            text = self._texts.get(row.name)
            if text is not None:
                self._counts.enter(row.name)
                text.computing(cached_tokens=row.cached_tokens)
        self._counts.begin_rows([(row.name, row.num_rows) for row in rows])

    def see(self, layer: int, ids_TK: npt.NDArray[np.int64], num_experts: int) -> npt.NDArray[np.bool_] | None:
        """Counts what each text gives to the experts; all rows are computed."""
        self._counts.add(layer, ids_TK, num_experts)
        return None

    def lost(self, layer: int, num_rows: int, reasons: Mapping[int, str]) -> None:
        """The texts of these rows end when the forward pass has ended; of others the rows are whole."""
        self._spoilt |= errors_of_texts(self._counts, num_rows, reasons)

    def spoilt(self) -> Collection[str]:
        return self._spoilt.keys()

    def choose(self, names: Sequence[str], logits_BV: torch.Tensor) -> Sequence[tuple[int, bool]]:
        for name, error in self._spoilt.items():
            spoilt = self._texts.get(name)
            if spoilt is not None:
                self._end_alone(spoilt, error)
            self._batches.cancel(name)  # it may have a part of its prompt to come
        with self._lock:
            texts = [self._texts.get(name) for name in names]
        there = [text for text in texts if text is not None]
        if len(there) < len(texts):  # some were cancelled meanwhile
            logits_BV = logits_BV[[row for row, text in enumerate(texts) if text is not None]]
        tokens = iter(choose_tokens(there, logits_BV))
        return [(0, True) if text is None else self._push(text, next(tokens)) for text in texts]

    def failed(self, name: str, error: Exception, computed: Sequence[str]) -> None:
        text = self._forget(name)
        if text is None:
            return
        if name not in computed:
            if computed:
                error = Unavailable("a batch of other texts failed")
            if isinstance(error, Unavailable):  # or the batches were closed
                self._on_failure(text, error)
                return
        broken = self._broken
        if broken is None or broken[0] is not error:
            broken = self._broken = error, batch_error(error, len(computed))
        self._on_failure(text, broken[1])

    def _push(self, text: RunningText, token: ChosenToken | MoeClusterError) -> tuple[int, bool]:
        """(the token's id, whether the text has ended). What goes wrong for the text is its own."""
        try:
            if isinstance(token, MoeClusterError):
                raise token
            is_last = text.push(token)
            if is_last and self._forget(text.name) is not None:
                self._on_end(text, self._counts.leave(text.name))
            return token.id, is_last
        except MoeClusterError as exc:
            self._end_alone(text, exc)
        except Exception as exc:
            self._end_alone(text, text_error(text.name, exc, "adding a token"))
        return 0, True

    def _end_alone(self, text: RunningText, error: MoeClusterError) -> None:
        self._forget(text.name)
        self._counts.leave(text.name)
        self._on_failure(text, error)

    def _forget(self, name: str) -> RunningText | None:
        with self._lock:
            return self._texts.pop(name, None)
