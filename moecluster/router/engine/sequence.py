"""One text that is being written: what has come, when it ends, and the pieces that its reader takes."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from moecluster.errors import MoeClusterError, Unavailable
from moecluster.generation import GenerationPiece, GenerationRequest, TokenLogprob
from moecluster.metrics import Metrics
from moecluster.models.tokenizer.decoding import Detokenizer
from moecluster.models.tokenizer.detokenizer import StreamingDecoder
from moecluster.models.tokenizer.token_bytes import TokenBytes
from moecluster.router.engine.batch_errors import text_error
from moecluster.router.engine.sampler import ChosenToken
from moecluster.router.engine.stop_strings import StopTexts
from moecluster.types import ExpertId

LOOK_S = 5.0  # between looks at whether somebody still writes


class RunningText:
    """Written by an engine's thread, read once by another. Only `cancel` and `is_over` may be called by any thread."""

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
        """max_new_tokens, with request.generated_ids, is at least 1. What was written elsewhere is read again, so that
        the text goes on as if it had begun here."""
        self.name = request.request_id
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
        self._stops = StopTexts(request.stop)
        self._metrics = metrics
        self._pieces: queue.SimpleQueue[GenerationPiece | MoeClusterError] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._over = False
        self._reason = ""  # why what was written elsewhere is all already
        self._last_s = time.monotonic()
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
    def most_ids(self) -> int:
        """As many tokens may there be in the end."""
        return len(self.prompt_ids) + self._max_new_tokens

    @property
    def is_over(self) -> bool:
        return self._over

    @property
    def is_complete(self) -> bool:
        """Whether what was written elsewhere is all already: there is nothing to compute."""
        return bool(self._reason)

    def computing(self, *, cached_tokens: int) -> None:
        """Rows of the text are about to be computed; so many tokens before them need no computing."""
        if self._cached_tokens is None:
            self._cached_tokens = min(cached_tokens, len(self.prompt_ids))

    def push(self, chosen: ChosenToken) -> bool:
        """Takes a token; True if it was the last, after which the engine calls `end`."""
        if self._over:
            return True
        text, self._reason = self._take(chosen.id)
        logprobs = (self._logprob(chosen),) if self.wants_logprobs else ()
        self._pieces.put(
            GenerationPiece(ids=(chosen.id,), text=text, logprobs=logprobs, weight_version=self.weight_version)
        )
        self._observe_token()
        return bool(self._reason)

    def end(self, experts: Mapping[ExpertId, int] | None = None) -> None:
        """The text is all: its reader gets the last piece."""
        try:
            last = self._last_piece(experts)
        except Exception as exc:  # of the tokenizer
            self.fail(text_error(self.name, exc, "decoding its end"))
            return
        self._close(last, self._reason or "cancelled")

    def _last_piece(self, experts: Mapping[ExpertId, int] | None) -> GenerationPiece:
        rest = "" if self._reason == "stop" and not self._ended_by_token() else self._rest()
        return GenerationPiece(
            text=rest,
            finish_reason=self._reason or "cancelled",
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self._cached_tokens or 0,
            weight_version=self.weight_version,
            experts=experts or {},
        )

    def fail(self, error: MoeClusterError) -> None:
        """The text cannot go on."""
        self._close(error, "failed")

    def on_over(self, over: Callable[[], object]) -> None:
        """What is called once, when nothing more is written."""
        self._on_over = over

    # -- the reader's side --

    def on_leave(self, leave: Callable[[], object]) -> None:
        """What is called when the reader has the last piece, or goes away before."""
        self._on_leave = leave

    def pieces(self, is_written: Callable[[], bool]) -> Iterator[GenerationPiece]:
        """The pieces as they come. Raises what the text failed with. An iterator that is left early ends the text.

        is_written: whether the engine still runs; else a text that waits for it would wait for ever.
        """
        try:
            while True:
                try:
                    piece = self._pieces.get(timeout=LOOK_S)
                except queue.Empty:
                    if not is_written() and self._pieces.empty():
                        raise Unavailable("the router writes no more") from None
                    continue
                if isinstance(piece, MoeClusterError):
                    raise piece
                yield piece
                if piece.finish_reason:
                    return
        finally:
            self._on_leave()

    # -- inside --

    def _take(self, token: int) -> tuple[str, str]:
        """(the text that became certain, why the text ends now; empty: it goes on)."""
        self.generated_ids.append(token)
        self.generated_counts[token] += 1
        if token in self._end_ids:  # never shown, though it be a plain token to the tokenizer
            return "", "stop"
        text, stopped = self._stops.push(self._decoder.push(token))
        # What is held back would be text if it ended here: a stop text in it ends it.
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
        """What decoder and stop texts held back."""
        text, stopped = self._stops.push(self._decoder.finish())
        if stopped:
            self._reason = "stop"
        return text if stopped else text + self._stops.finish()

    def _close(self, last: GenerationPiece | MoeClusterError, status: str) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
        self._pieces.put(last)
        self._on_over()
        if self._metrics is not None:
            self._metrics.count_request(status)

    def _logprob(self, chosen: ChosenToken) -> TokenLogprob:
        assert chosen.logprob is not None, "a text that wants them is given them"
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
