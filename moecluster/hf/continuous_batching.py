"""transformers' continuous batching, with the choice of tokens and the end of texts in the caller's hands.

Its manager gives the paged cache, the prefix cache, chunked prefill and the scheduling. Of its own sampling parameters
all but three are the same for all texts, so the whole choice is made in its one hook, the logits processors: they
return logits whose best token is the chosen one.
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
    """Room of a manager. All of it is taken at the start."""

    max_cached_tokens: int  # of all texts together, prompts included
    max_batch_tokens: int  # computed at once: longer prompts are computed in parts
    max_texts: int  # computed at once


@dataclass(frozen=True, kw_only=True)
class BatchRows:
    """The rows that one text has in a batch."""

    name: str
    num_rows: int
    cached_tokens: int  # of the text, before these rows


class BatchHooks(Protocol):
    """What the manager's thread calls, for every batch."""

    def begin_batch(self, rows: Sequence[BatchRows]) -> None:
        """The next forward pass computes these rows, in this order."""

    def choose(self, names: Sequence[str], logits_BV: torch.Tensor) -> Sequence[tuple[int, bool]]:
        """The next token of each text, and whether it is the text's last. logits_BV: float32, a row for each name."""

    def spoilt(self) -> Collection[str]:
        """Texts of this forward pass, asked after `choose`, whose rows went wrong: they are not kept for others."""

    def failed(self, name: str, error: Exception, computed: Sequence[str]) -> None:
        """The text was given up. computed: the texts in the forward pass that the error came out of; none: another
        place that it came from."""


class PagedBatches:
    """Texts that are computed together on a paged cache, by a thread of its own. Ends with close()."""

    def __init__(self, model: PreTrainedModel, limits: PagedLimits, hooks: BatchHooks) -> None:
        """model: with its experts attached; nothing else may generate with it meanwhile. Its attention may be another
        implementation from now on."""
        # Its errors reach the hooks; the log would only repeat them, with a traceback.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=-(-limits.max_cached_tokens // PAGE_TOKENS),
            max_batch_tokens=limits.max_batch_tokens,
            max_requests_per_batch=min(limits.max_texts, limits.max_batch_tokens),
        )
        # Ends are decided by the hooks alone.
        settings = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=None)
        with MODEL_BUILDING:  # it may switch the model's attention
            self._manager: Any = model.init_continuous_batching(settings, config)  # type: ignore[operator]
        # It would switch the attention back when it ends, under the feet of the one that comes after it.
        self._manager._original_attn_impl = None
        choice = _Choice(hooks)
        self._failures = _Failures(hooks, choice)
        self._manager.logit_processor = choice
        self._manager.output_router = self._failures
        self._closing = threading.Lock()
        self._manager.start()

    def add(self, name: str, ids: Sequence[int]) -> None:
        """Begins a text, given all its tokens so far. Raises Unavailable if the thread has ended."""
        if self._manager.add_request(list(ids), request_id=name) is None:
            raise Unavailable("the batches have ended")

    def cancel(self, name: str) -> None:
        """Ends a text before the next batch. Fine if there is none of that name."""
        self._manager.cancel_request(name)

    def is_running(self) -> bool:
        """False once a batch has failed: then all texts are given up, and none is taken."""
        return bool(self._manager.is_running()) and (
            self._manager.background_thread_status.can_accept_new_requests() is None
        )

    def close(self, timeout_s: float) -> None:
        """Gives up what is left, and frees the cache. Fine if another thread closes it, too."""
        self._failures.is_closing = True
        with self._closing:  # the manager takes its thread away from whoever else waits for it
            self._manager.stop(block=True, timeout=timeout_s, hard_stop=True)


class _Choice(ContinuousBatchingLogitsProcessorList):
    """Stands where the manager keeps its logits processors; sees every batch before and after its forward pass."""

    def __init__(self, hooks: BatchHooks) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._hooks = hooks
        self._futures: list[Any] = []  # FutureRequestState of the texts that are computed
        self._states: list[Any] = []  # RequestState of those that get a token
        self.computed: list[str] = []  # the texts of the forward pass that is on

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """None are given."""

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        self.computed = [future.state.request_id for future in requests_in_batch]
        # The manager has added the rows to position_offset already.
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
                future.complete_blocks = {}  # else the prefix cache gives them to the next text that begins so
        self.computed = []
        return chosen_logits(scores, enumerate(token for token, _ in chosen))


class _Failures(OutputRouter):
    """Takes what the manager gives out: finished texts are known already, failed ones go to the hooks."""

    def __init__(self, hooks: BatchHooks, choice: _Choice) -> None:
        super().__init__()
        self.is_closing = False
        self._hooks = hooks
        self._choice = choice

    def deliver(self, output: Any) -> None:
        """Keeps nothing."""

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Keeps nothing."""

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        if self.is_closing:
            self._hooks.failed(state.request_id, Unavailable("the batches have ended"), ())
        else:
            self._hooks.failed(state.request_id, error, self._choice.computed)


def supports_paging(model: PreTrainedModel) -> bool:
    """Whether the model's kind of attention runs on the paged cache: tries three tokens. Leaves the model as it was.

    Families with latent attention (DeepSeek-V3), state spaces or convolutions do not.
    """
    with left_as_it_was(model):
        return _runs_paged(model)


def _runs_paged(model: PreTrainedModel) -> bool:
    probe = _Probe()
    try:
        batches = PagedBatches(model, PagedLimits(max_cached_tokens=128, max_batch_tokens=8, max_texts=1), probe)
    except Exception as exc:  # whatever a family's code raises: it is written in padded batches then
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
    """One text of two tokens: a prompt, and a step on the cache."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.works = False
        self._chosen = 0

    def begin_batch(self, rows: Sequence[BatchRows]) -> None:
        """Nothing is counted."""

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
