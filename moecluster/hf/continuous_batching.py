"""transformers' continuous batching, with sampling and stop conditions decided by the caller.

Its manager provides the paged cache, the prefix cache, chunked prefill and scheduling. All but three of its sampling
parameters are the same for all sequences, so sampling happens in its one hook, the logits processors: they return
logits whose best token is the sampled one.
"""

import logging
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.logits_process import LogitsProcessorList

from moecluster.errors import Unavailable
from moecluster.hf.chosen_logits import chosen_logits
from moecluster.hf.modelling import MODEL_BUILDING
from moecluster.hf.trial import left_as_it_was

logger = logging.getLogger(__name__)

PAGE_TOKENS = 32
PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class PagedLimits:
    """Capacity of a manager. The whole cache is allocated at the start."""

    max_cached_tokens: int  # of all sequences together, prompts included
    max_batch_tokens: int  # per forward pass; longer prompts are split
    max_sequences: int  # per forward pass


@dataclass(frozen=True, kw_only=True)
class BatchRows:
    """The rows of one sequence in a batch."""

    name: str
    num_rows: int
    cached_tokens: int  # of the sequence, before these rows


class BatchHooks(Protocol):
    """Callbacks that the manager's thread calls for every batch."""

    def begin_batch(self, rows: Sequence[BatchRows]) -> None:
        """Called before a forward pass that computes these rows, in this order."""

    def choose(self, names: Sequence[str], logits_BV: torch.Tensor) -> Sequence[tuple[int, bool]]:
        """Returns the next token of each sequence, and whether it is the last. logits_BV: float32, one row per name."""

    def spoilt(self) -> Collection[str]:
        """Returns the sequences of this forward pass whose rows are wrong, so that they stay out of the prefix cache.
        Called after `choose`."""

    def failed(self, name: str, error: Exception, computed: Sequence[str]) -> None:
        """Called when a sequence has failed. computed: the sequences of the forward pass that raised the error; empty
        if it was raised elsewhere."""


def silence_batch_log() -> None:
    """For the start of a process: what the manager logs is a repetition, with a traceback, of errors that the hooks
    get."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)


class PagedBatches:
    """Sequences batched over a paged cache, computed in a thread of its own. close() ends it."""

    def __init__(self, model: PreTrainedModel, limits: PagedLimits, hooks: BatchHooks) -> None:
        """model: with its experts attached; nothing else may generate with it meanwhile. This may replace the model's
        attention implementation for good."""
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=-(-limits.max_cached_tokens // PAGE_TOKENS),
            max_batch_tokens=limits.max_batch_tokens,
            max_requests_per_batch=min(limits.max_sequences, limits.max_batch_tokens),
        )
        # The hooks alone decide where a sequence ends.
        settings = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=None)
        with MODEL_BUILDING:  # it may switch the model's attention
            self._manager: Any = model.init_continuous_batching(settings, config)  # type: ignore[operator]
        # Or it would restore the old attention when it ends, while the next manager already runs.
        self._manager._original_attn_impl = None
        choice = _Choice(hooks)
        self._failures = _Failures(hooks, choice)
        self._manager.logit_processor = choice
        self._manager.output_router = self._failures
        self._closing = threading.Lock()
        self._manager.start()

    def add(self, name: str, ids: Sequence[int]) -> None:
        """Adds a sequence with all its tokens so far. Raises Unavailable if the thread has ended or is about to."""
        is_added = self._manager.add_request(list(ids), request_id=name) is not None
        # The manager may have emptied its queue for the last time before it was added.
        if not is_added or not self.is_running():
            raise Unavailable("the batches have ended")

    def cancel(self, name: str) -> None:
        """Ends a sequence before the next batch. Ignores an unknown name."""
        self._manager.cancel_request(name)

    def is_running(self) -> bool:
        """False once a batch has failed: then all sequences have failed, and no new one is accepted."""
        return bool(self._manager.is_running()) and (
            self._manager.background_thread_status.can_accept_new_requests() is None
        )

    def close(self, timeout_s: float) -> None:
        """Fails the remaining sequences and frees the cache. Other threads may close it, too."""
        self._failures.is_closing = True
        with self._closing:  # the manager's stop() is not safe to call from two threads at once
            self._manager.stop(block=True, timeout=timeout_s, hard_stop=True)


class _Choice(ContinuousBatchingLogitsProcessorList):
    """Replaces the manager's logits processors, and so sees every batch before and after its forward pass."""

    def __init__(self, hooks: BatchHooks) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._hooks = hooks
        self._futures: list[Any] = []  # FutureRequestState of the sequences in the batch
        self._states: list[Any] = []  # RequestState of those that get a token
        self.computed: list[str] = []  # the sequences of the running forward pass

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Does nothing: there are no keyword arguments."""

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        self.computed = [future.state.request_id for future in requests_in_batch]
        # The manager has already added the rows to position_offset.
        self._hooks.begin_batch(
            [
                BatchRows(
                    name=future.state.request_id,
                    num_rows=future.query_length,
                    cached_tokens=future.state.position_offset - future.query_length,
                )
                for future in requests_in_batch
            ]
        )
        self._futures = requests_in_batch
        self._states = [future.state for future in requests_in_batch if future.has_new_token]
        return arg_storage

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        names = [state.request_id for state in self._states]
        chosen = self._hooks.choose(names, scores[: len(names)])  # further rows belong to unfinished prompts
        for state, (token, is_last) in zip(self._states, chosen, strict=True):
            state._eos_token_ids = {token} if is_last else set()
        spoilt = self._hooks.spoilt()
        for future in self._futures:
            if future.state.request_id in spoilt:
                future.complete_blocks = {}  # or the prefix cache would reuse them for the next sequence
        self.computed = []
        return chosen_logits(scores, enumerate(token for token, _ in chosen))


class _Failures(OutputRouter):
    """Receives the manager's outputs. Drops finished sequences, which are known already; reports failed ones to the
    hooks."""

    def __init__(self, hooks: BatchHooks, choice: _Choice) -> None:
        super().__init__()
        self.is_closing = False
        self._hooks = hooks
        self._choice = choice

    def deliver(self, output: Any) -> None:
        """Drops the output."""

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Drops the outputs."""

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        if self.is_closing:
            self._hooks.failed(state.request_id, Unavailable("the batches have ended"), ())
        else:
            self._hooks.failed(state.request_id, error, self._choice.computed)


def supports_paging(model: PreTrainedModel) -> bool:
    """Whether the model's attention runs on the paged cache: tries three tokens. Leaves the model unchanged.

    It does not in families with latent attention (DeepSeek-V3), state spaces or convolutions.
    """
    with left_as_it_was(model):
        return _runs_paged(model)


def _runs_paged(model: PreTrainedModel) -> bool:
    probe = _Probe()
    try:
        batches = PagedBatches(model, PagedLimits(max_cached_tokens=128, max_batch_tokens=8, max_sequences=1), probe)
    except Exception as exc:  # a family's code may raise anything; the model is then served in padded batches
        logger.debug("no paged cache for a %s model: %r", model.config.model_type, exc)
        return False
    try:
        batches.add("probe", [0, 0])
        return probe.ended.wait(PROBE_TIMEOUT_S) and probe.works
    except Unavailable:
        return False
    finally:
        batches.close(PROBE_TIMEOUT_S)


class _Probe:
    """The hooks of a trial with one sequence: a prompt, and one decoding step on the cache."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.works = False
        self._chosen = 0

    def begin_batch(self, rows: Sequence[BatchRows]) -> None:
        """Does nothing."""

    def choose(self, names: Sequence[str], logits_BV: torch.Tensor) -> Sequence[tuple[int, bool]]:
        self._chosen += len(names)
        if self._chosen == 2:
            self.works = True
            self.ended.set()
        return [(0, self._chosen >= 2) for _ in names]

    def spoilt(self) -> Collection[str]:
        return ()

    def failed(self, name: str, error: Exception, computed: Sequence[str]) -> None:
        self.ended.set()
