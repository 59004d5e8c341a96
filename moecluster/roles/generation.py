"""One generation: transformers' generate() in a thread of its own, its tokens as they come."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from moecluster.errors import MoeClusterError
from moecluster.generations import GenerationPiece, GenerationRequest
from moecluster.metrics import Metrics
from moecluster.models.streaming_decoder import StreamingDecoder
from moecluster.roles.load_counts import LoadCounts
from moecluster.roles.model_versions import ModelUse
from moecluster.roles.remote_experts import RemoteExperts
from moecluster.roles.sampling import KeyedSampler
from moecluster.types import ExpertId


class Generation:
    """A running generation. `pieces` may be read once; `cancel` ends it at the next token."""

    def __init__(
        self,
        request: GenerationRequest,
        prompt_ids: list[int],
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        experts: RemoteExperts,
        metrics: Metrics | None = None,
        use: ModelUse[Any],
        on_end: Callable[["Generation"], None] = lambda generation: None,
    ) -> None:
        """Starts at once. on_end is called by its thread, when it computes no more; use, the hold on the model, is
        released then."""
        self.request = request
        self._prompt_ids = prompt_ids
        self._model = model
        self._experts = experts
        self._metrics = metrics
        self._on_end = on_end
        self._use = use
        self._cancelled = threading.Event()
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._counts = LoadCounts()
        self._decoder = StreamingDecoder(tokenizer)
        self._started_s = time.monotonic()
        self._thread = threading.Thread(target=self._generate, name=f"generate-{request.request_id}", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Ends the generation at the next token."""
        self._cancelled.set()

    def join(self, timeout_s: float) -> None:
        """Waits for the thread's end."""
        self._thread.join(timeout_s)

    def pieces(self) -> Iterator[GenerationPiece]:
        """Tokens as they come, then the last piece. Raises what the generation raised. Left early, it cancels."""
        status = "cancelled"
        last = None
        try:
            for token in iter(self._tokens.get, None):
                self._observe_token(first=last is None)
                last = token
                yield GenerationPiece(ids=(token,), text=self._decoder.push(token))
            if self._error is not None:
                status = "failed"
                raise self._error
            status = self._finish_reason(last)
            yield GenerationPiece(
                text=self._decoder.finish(),
                finish_reason=status,
                prompt_tokens=len(self._prompt_ids),
                experts=self._expert_counts(),
                weight_version=self._use.version,
            )
        finally:
            self._cancelled.set()
            if self._metrics is not None:
                self._metrics.count_request(status)

    def _generate(self) -> None:
        request = self.request
        processors = LogitsProcessorList([KeyedSampler(request.sampling)] if request.sampling.temperature > 0 else [])
        settings = GenerationConfig(
            max_new_tokens=request.max_new_tokens or None,
            do_sample=False,  # sampled by KeyedSampler
            eos_token_id=self._end_ids() or None,
            pad_token_id=(self._end_ids() or [0])[0],
        )
        ids = torch.tensor([self._prompt_ids], device=self._model.device)
        try:
            with self._experts.counting() as self._counts, torch.no_grad():
                self._model.generate(  # type: ignore[operator]  # untyped upstream
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=settings,
                    logits_processor=processors,
                    stopping_criteria=StoppingCriteriaList([_StopWhen(self._cancelled)]),
                    streamer=_Streamer(self._tokens),
                )
        except MoeClusterError as exc:
            self._error = exc
        except Exception as exc:  # whatever a model raises: a text that merely ended early would pass for a whole one
            self._error = MoeClusterError(f"the generation failed: {exc!r}")
        finally:
            self._on_end(self)
            self._use.release()
            self._tokens.put(None)

    def _end_ids(self) -> list[int]:
        own = self._model.generation_config
        end = own.eos_token_id if own is not None else None
        return [] if end is None else [end] if isinstance(end, int) else [int(i) for i in end]

    def _finish_reason(self, last: int | None) -> str:
        if last in self._end_ids():
            return "stop"
        return "cancelled" if self._cancelled.is_set() else "length"

    def _expert_counts(self) -> dict[ExpertId, int]:
        return {
            ExpertId(layer=layer, index=index): int(count)
            for layer, counts_E in self._counts.snapshot().items()
            for index, count in enumerate(counts_E)
            if count
        }

    def _observe_token(self, *, first: bool) -> None:
        now_s = time.monotonic()
        if self._metrics is not None:
            observe = self._metrics.observe_first_token if first else self._metrics.observe_next_token
            observe(now_s - self._started_s)
        self._started_s = now_s


class _Streamer(BaseStreamer):
    """Hands over each new token; generate() puts the prompt first."""

    def __init__(self, tokens: "queue.SimpleQueue[int | None]") -> None:
        self._tokens = tokens
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self._tokens.put(token)

    def end(self) -> None:
        """The thread itself says when all is done, also after an error."""


class _StopWhen(StoppingCriteria):
    """Ends a generation once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        stop: torch.BoolTensor = torch.full(  # type: ignore[assignment]
            (input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device
        )
        return stop
