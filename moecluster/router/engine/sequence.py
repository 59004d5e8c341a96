"""One sequence: its tokens so far, when it ends, and the chunks for its reader."""

import queue
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from moecluster.errors import MoeClusterError, Unavailable
from moecluster.generation import GenerationChunk, GenerationRequest, TokenLogprob
from moecluster.metrics import Metrics
from moecluster.models.tokenizer.decoding import Detokenizer
from moecluster.models.tokenizer.detokenizer import StreamingDecoder
from moecluster.models.tokenizer.token_bytes import TokenBytes
from moecluster.router.engine.batch_errors import sequence_error
from moecluster.router.engine.sampler import SampledToken
from moecluster.router.engine.stop_strings import StopStrings
from moecluster.types import ExpertId

POLL_S = 5.0  # between checks that the engine still runs


class TokenSequence:
    """Filled by an engine's thread, read once by another. Any thread may read `is_over`."""

    def __init__(
        self,
        request: GenerationRequest,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        end_ids: frozenset[int],
        detokenizer: Detokenizer,
        token_bytes: TokenBytes,
        weight_version: int = 0,
        metrics: Metrics | None = None,
    ) -> None:
        """max_new_tokens counts request.generated_ids too and is at least 1. Those tokens, which another router
        generated, are replayed, so that the sequence continues as if it had started here."""
        self.name = request.request_id
        # Batches learn later that a sequence was cancelled; by then its name may be another's.
        self.key = f"{self.name}/{uuid.uuid4().hex}"
        self.sampling = request.sampling
        self.wants_logprobs = request.logprobs
        self.top_logprobs = request.top_logprobs
        self.prompt_ids = tuple(prompt_ids)
        self.generated_ids: list[int] = []
        self.generated_counts: Counter[int] = Counter()
        self._cached_tokens: int | None = None  # None: nothing is computed yet
        self.weight_version = weight_version
        self.begun_s: float | None = None  # when the engine began to compute it
        self._max_new_tokens = max_new_tokens
        self._end_ids = frozenset() if request.ignore_eos else end_ids
        self._decoder = StreamingDecoder(detokenizer)
        self._token_bytes = token_bytes
        self._stops = StopStrings(request.stop)
        self._metrics = metrics
        self._chunks: queue.SimpleQueue[GenerationChunk | MoeClusterError] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._over = False
        self._reason = ""  # finish reason, if the replayed tokens complete the sequence
        self._arrived_s = self._last_s = time.monotonic()
        self._on_leave: Callable[[], object] = lambda: None
        self._on_over: Callable[[], object] = lambda: None
        for token in request.generated_ids:
            if not self._reason:
                _, self._reason = self._take(token)
        self._inherited = len(self.generated_ids)

    # -- the engine's side --

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens so far."""
        return (*self.prompt_ids, *self.generated_ids)

    @property
    def max_ids(self) -> int:
        """Maximum total length: prompt plus new tokens."""
        return len(self.prompt_ids) + self._max_new_tokens

    @property
    def is_over(self) -> bool:
        return self._over

    @property
    def is_complete(self) -> bool:
        """Whether the replayed tokens complete the sequence, so that nothing is left to compute."""
        return bool(self._reason)

    def computing(self, *, cached_tokens: int) -> None:
        """Its rows are about to be computed. cached_tokens: tokens before them that need no computing."""
        if self._cached_tokens is None:
            self._cached_tokens = min(cached_tokens, len(self.prompt_ids))

    def push(self, chosen: SampledToken) -> bool:
        """Appends a token. Returns True if it was the last; the engine then calls `end`."""
        if self._over:
            return True
        text, self._reason = self._take(chosen.id)
        logprobs = (self._logprob(chosen),) if self.wants_logprobs else ()
        self._chunks.put(
            GenerationChunk(ids=(chosen.id,), text=text, logprobs=logprobs, weight_version=self.weight_version)
        )
        self._observe_token()
        return bool(self._reason)

    def end(self, experts: Mapping[ExpertId, int] | None = None) -> None:
        """Ends the sequence: its reader gets the last chunk."""
        try:
            last = self._last_chunk(experts)
        except Exception as exc:  # of the tokenizer
            self.fail(sequence_error(self.name, exc, "decoding its end"))
            return
        self._close(last, self._reason or "cancelled")

    def _last_chunk(self, experts: Mapping[ExpertId, int] | None) -> GenerationChunk:
        rest = "" if self._reason == "stop" and not self._ended_by_token() else self._rest()
        return GenerationChunk(
            text=rest,
            finish_reason=self._reason or "cancelled",
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self._cached_tokens or 0,
            weight_version=self.weight_version,
            experts=experts or {},
        )

    def fail(self, error: MoeClusterError) -> None:
        """Ends the sequence with an error."""
        self._close(error, "failed")

    def on_over(self, over: Callable[[], object]) -> None:
        """Sets the callback for when nothing more is computed; it is called once."""
        self._on_over = over

    # -- the reader's side --

    def on_leave(self, leave: Callable[[], object]) -> None:
        """Sets the callback for when the reader has the last chunk, or stops reading before."""
        self._on_leave = leave

    def stream(self, is_running: Callable[[], bool]) -> Iterator[GenerationChunk]:
        """Yields chunks as they come. Raises the error of a failed sequence. Closing the iterator early ends the
        sequence.

        is_running: whether the engine still runs; else a reader would wait forever.
        """
        try:
            while True:
                try:
                    chunk = self._chunks.get(timeout=POLL_S)
                except queue.Empty:
                    if not is_running() and self._chunks.empty():
                        raise Unavailable("the router has stopped generating") from None
                    continue
                if isinstance(chunk, MoeClusterError):
                    raise chunk
                yield chunk
                if chunk.finish_reason:
                    return
        finally:
            self._on_leave()

    # -- inside --

    def _take(self, token: int) -> tuple[str, str]:
        """Returns (text that became certain, finish reason; empty: the sequence goes on)."""
        self.generated_ids.append(token)
        self.generated_counts[token] += 1
        if token in self._end_ids:  # never shown, even if the tokenizer has it as plain text
            return "", "stop"
        text, stopped = self._stops.push(self._decoder.push(token))
        # Held-back characters would be shown if the sequence ended here: a stop string among them ends it.
        if not stopped and self._stops.come_with(self._decoder.pending()):
            rest = self._decoder.finish()
            if self._stops.come_with(rest):
                more, stopped = self._stops.push(rest)
                text += more
        if stopped:
            return text, "stop"
        return text, "length" if len(self.generated_ids) >= self._max_new_tokens else ""

    def _ended_by_token(self) -> bool:
        return bool(self.generated_ids) and self.generated_ids[-1] in self._end_ids

    def _rest(self) -> str:
        """The characters that the decoder and the stop strings hold back."""
        text, stopped = self._stops.push(self._decoder.finish())
        if stopped:
            self._reason = "stop"
        return text if stopped else text + self._stops.finish()

    def _close(self, last: GenerationChunk | MoeClusterError, status: str) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
        if self._metrics is not None:
            self._metrics.count_request(status)
            self._metrics.observe_request(
                status,
                seconds=time.monotonic() - self._arrived_s,
                prompt_tokens=len(self.prompt_ids),
                cached_tokens=self._cached_tokens or 0,
            )
        self._chunks.put(last)  # then the reader may look at the metrics
        self._on_over()

    def _logprob(self, chosen: SampledToken) -> TokenLogprob:
        assert chosen.logprob is not None, "the sampler gives log-probabilities to sequences that want them"
        return TokenLogprob(
            id=chosen.id,
            logprob=chosen.logprob,
            token=self._token_bytes.of(chosen.id),
            top=tuple(
                TokenLogprob(id=token, logprob=logprob, token=self._token_bytes.of(token))
                for token, logprob in chosen.top
            ),
        )

    def _observe_token(self) -> None:
        now_s = time.monotonic()
        if self._metrics is not None:
            first = len(self.generated_ids) == self._inherited + 1
            (self._metrics.observe_first_token if first else self._metrics.observe_next_token)(now_s - self._last_s)
        self._last_s = now_s
