"""Texts written in padded batches by transformers' `generate()`, for families that continuous batching cannot serve.

A text waits until one of the threads is free, and begins with what else waits then. Rows of padding, and of texts that
have ended, are not sent to experts.
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

from moecluster.dispatch.trunk_backend import TrunkExperts
from moecluster.errors import MoeClusterError, Unavailable
from moecluster.hf.chosen_logits import chosen_logits
from moecluster.hf.padding import sees_padding
from moecluster.hf.trial import without_generation_settings
from moecluster.router.engine.batch_errors import batch_error, errors_of_texts, text_error
from moecluster.router.engine.engine import EngineLimits, OnEnd, OnFailure
from moecluster.router.engine.expert_counts import ExpertCounts
from moecluster.router.engine.sampler import ChosenToken, choose_tokens
from moecluster.router.engine.sequence import RunningText

NUM_THREADS = 2  # batches at once: what comes while one is written need not wait for its end
GROWTH_TOKENS = 256  # that every text of a new batch has room for: those that go on then do so in smaller batches
PAD_ID = 0
NOBODYS = ""  # owner of rows that no text needs


class PaddedWriter:
    """A Writer."""

    def __init__(
        self,
        model: PreTrainedModel,
        experts: TrunkExperts,
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
        self._waiting: deque[RunningText] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"padded-{i}", daemon=True) for i in range(NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def write(self, text: RunningText) -> None:
        with self._changed:
            if self._closed:
                raise Unavailable("the batches have ended")
            self._waiting.append(text)
            self._changed.notify()

    def cancel(self, text: RunningText) -> None:
        with self._changed:
            if text in self._waiting:
                self._waiting.remove(text)

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
                running.write(self._model, lambda: self._closed)
                self._write_on(running.unfinished())
            except Exception as exc:  # whatever a model raises ends these texts, not the thread
                left = running.unfinished()
                error = batch_error(exc, len(left))
                for text in left:
                    self._on_failure(text, error)

    def _write_on(self, texts: Sequence[RunningText]) -> None:
        """A batch had no more room: its texts go on in smaller ones, before what came later."""
        with self._changed:
            if not self._closed:
                self._waiting.extendleft(reversed(texts))
                self._changed.notify()

    def _next_batch(self) -> list[RunningText]:
        """What waits, in order, as far as it fits; nothing when all is over."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()  # for write(), or close()
            batch: list[RunningText] = []
            for text in tuple(self._waiting):
                if len(batch) == self._max_batch:
                    break
                if self._equal_lengths and batch and len(text.ids) != len(batch[0].ids):
                    continue
                longest = max(min(each.most_ids, len(each.ids) + GROWTH_TOKENS) for each in (*batch, text))
                if batch and longest * (len(batch) + 1) > self.max_tokens:
                    break
                self._waiting.remove(text)
                batch.append(text)
            return batch


class _Batch:
    """One call of generate(). Satisfies RowWatcher."""

    def __init__(
        self,
        texts: Sequence[RunningText],
        experts: TrunkExperts,
        on_end: OnEnd,
        on_failure: OnFailure,
        *,
        max_tokens: int,
    ) -> None:
        """max_tokens: of all rows together, padding included; a single text is written in any case."""
        self._texts = texts
        self._max_tokens = max_tokens
        self._experts = experts
        self._on_end, self._on_failure = on_end, on_failure
        self._counts = ExpertCounts()
        self._ended: set[str] = set()
        self._spoilt: dict[str, MoeClusterError] = {}  # texts of the forward pass that is on, and what is wrong

    def write(self, model: Any, is_closed: Callable[[], bool]) -> None:
        """model: a PreTrainedModel with transformers' GenerationMixin."""
        length = max(len(text.ids) for text in self._texts)
        rows = [(*[PAD_ID] * (length - len(text.ids)), *text.ids) for text in self._texts]
        mask = [[0] * (length - len(text.ids)) + [1] * len(text.ids) for text in self._texts]
        for text in self._texts:
            text.computing(cached_tokens=0)
            self._counts.enter(text.name)
        self._counts.begin_rows(
            [owner for text in self._texts for owner in ((NOBODYS, length - len(text.ids)), (text.name, len(text.ids)))]
        )
        self._experts.watch(self)
        with torch.no_grad():
            model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=GenerationConfig(
                    max_new_tokens=max(text.most_ids - len(text.ids) for text in self._texts),
                    do_sample=False,
                    eos_token_id=None,  # ends are decided by the texts alone, and choices by their own parameters
                    pad_token_id=PAD_ID,
                ),
                logits_processor=LogitsProcessorList([_Choice(self)]),
                stopping_criteria=StoppingCriteriaList([_Ends(self, is_closed)]),
            )

    def see(self, layer: int, ids_TK: npt.NDArray[np.int64], num_experts: int) -> npt.NDArray[np.bool_] | None:
        """Counts what each text gives to the experts, and leaves out what nobody needs."""
        owned_T = self._counts.owned_T
        self._counts.add(layer, ids_TK, num_experts)
        return owned_T if len(owned_T) == len(ids_TK) and not owned_T.all() else None

    def lost(self, layer: int, num_rows: int, reasons: Mapping[int, str]) -> None:
        """The texts of these rows end before their next token; of others the rows are whole."""
        self._spoilt |= errors_of_texts(self._counts, num_rows, reasons)

    def choose(self, scores_BV: torch.Tensor) -> torch.Tensor:
        spoilt, self._spoilt = self._spoilt, {}
        for text in self._texts:
            if text.name in spoilt and text.name not in self._ended:
                self._fail(text, spoilt[text.name])
        rows = [row for row, text in enumerate(self._texts) if text.name not in self._ended]
        tokens = choose_tokens([self._texts[row] for row in rows], scores_BV[rows])
        for row, token in zip(rows, tokens, strict=True):
            self._push(self._texts[row], token)
        self._counts.begin_rows([(NOBODYS if t.name in self._ended else t.name, 1) for t in self._texts])
        ids = [token.id if isinstance(token, ChosenToken) else PAD_ID for token in tokens]
        return chosen_logits(scores_BV, zip(rows, ids, strict=True))

    def _push(self, text: RunningText, token: ChosenToken | MoeClusterError) -> None:
        """What goes wrong for the text is its own."""
        try:
            if isinstance(token, MoeClusterError):
                self._fail(text, token)
            elif text.push(token):
                self._ended.add(text.name)
                self._on_end(text, self._counts.leave(text.name))
        except Exception as exc:
            self._fail(text, text_error(text.name, exc, "adding a token"))

    def _fail(self, text: RunningText, error: MoeClusterError) -> None:
        self._ended.add(text.name)
        self._counts.leave(text.name)
        self._on_failure(text, error)

    def ends(self, length: int) -> list[bool]:
        """Which rows need no further token; all, if there is no room for longer ones."""
        if len(self._texts) > 1 and len(self._texts) * (length + 1) > self._max_tokens:
            return [True] * len(self._texts)
        return [text.name in self._ended for text in self._texts]

    def unfinished(self) -> list[RunningText]:
        """What goes on."""
        return [text for text in self._texts if text.name not in self._ended and not text.is_over]


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
