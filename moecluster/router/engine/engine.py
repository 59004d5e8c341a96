"""The engine: admits sequences, queues them in order, and runs them together through a batch runner.

There are two batch runners. Families whose attention runs on transformers' paged cache are batched continuously: a
sequence joins at the next step and leaves after its last. Others run in padded batches through `generate()`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from moecluster.config.sections import ServeConfig
from moecluster.errors import ContextLengthExceeded, Exhausted, InvalidMessage, MoeClusterError, Unavailable
from moecluster.generation import GenerationChunk, GenerationRequest
from moecluster.router.engine.batch_errors import sequence_error
from moecluster.router.engine.sequence import TokenSequence
from moecluster.types import ExpertId

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
FIRST_SEQUENCE_S = 1.0  # assumed duration of a sequence until one has ended
MAX_RETRY_AFTER_S = 60.0
NEW_WEIGHT = 0.2  # of the newest sequence in the mean duration


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """How much an engine admits at once."""

    max_running: int = 64  # sequences run together
    max_waiting: int = 256  # sequences in the queue; beyond it: refused
    max_waiting_tokens: int = 2**18  # of their prompts
    max_cached_tokens: int = 2**14  # of all running sequences, prompts included
    max_batch_tokens: int = 512  # computed at once

    @classmethod
    def of(cls, serve: ServeConfig) -> Self:
        """The limits that the settings name."""
        return cls(
            max_running=serve.max_running,
            max_waiting=serve.max_waiting,
            max_waiting_tokens=serve.max_waiting_tokens,
            max_cached_tokens=serve.max_cached_tokens,
            max_batch_tokens=serve.max_batch_tokens,
        )


class BatchRunner(Protocol):
    """Runs sequences in batches until they end."""

    max_tokens: int  # most that one sequence may have, prompt included

    def add(self, sequence: TokenSequence) -> None:
        """Starts a sequence; on_end or on_failure follows. Raises Unavailable if no thread runs."""

    def cancel(self, sequence: TokenSequence) -> None:
        """Stops computing a sequence that has already ended."""

    def is_alive(self) -> bool:
        """Whether the runner still computes."""

    def close(self, timeout_s: float) -> None:
        """Drops the remaining sequences and ends its threads."""


OnEnd = Callable[[TokenSequence, Mapping[ExpertId, int]], None]
OnFailure = Callable[[TokenSequence, MoeClusterError], None]
MakeRunner = Callable[[OnEnd, OnFailure], BatchRunner]
MakeSequence = Callable[[GenerationRequest, Sequence[int], int], TokenSequence]  # of prompt ids and max_new_tokens


class Engine:
    """Thread-safe. Ends with close()."""

    def __init__(
        self,
        make_runner: MakeRunner,
        make_sequence: MakeSequence,
        limits: EngineLimits,
        *,
        max_positions: int | None = None,
    ) -> None:
        """make_runner is called now, and again if the runner dies. max_positions: of the model."""
        self._make_runner = make_runner
        self._make_sequence = make_sequence
        self._max_positions = max_positions
        self._limits = limits
        self._lock = threading.RLock()
        self._running: dict[str, TokenSequence] = {}
        self._waiting: deque[TokenSequence] = deque()
        self._waiting_tokens = 0
        self._sequence_s = FIRST_SEQUENCE_S
        self._closed = False
        self._runner = make_runner(self._ended, self._failed)
        self._replacing = False  # the runner is being closed, and no new one could be made yet

    @property
    def max_tokens(self) -> int:
        """Most that one sequence may have, prompt included."""
        return min(self._runner.max_tokens, self._max_positions or self._runner.max_tokens)

    @property
    def running(self) -> int:
        """Sequences that are being generated."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the running sequences, prompts included."""
        with self._lock:
            return sum(len(sequence.prompt_ids) + len(sequence.generated_ids) for sequence in self._running.values())

    @property
    def max_cached_tokens(self) -> int:
        """Tokens of all running sequences that there is room for."""
        return self._limits.max_cached_tokens

    def begin(
        self,
        request: GenerationRequest,
        prompt_ids: Sequence[int],
        *,
        on_over: Callable[[], object] = lambda: None,
    ) -> Iterator[GenerationChunk]:
        """Admits a request and streams its chunks. on_over: called once, when nothing more is computed for it.

        Raises Exhausted if the queue is full, ContextLengthExceeded if the request is too long, InvalidMessage if one
        of its name already runs, RequestFailed if its generated_ids cannot be decoded; then on_over is not called.
        """
        room = self.max_tokens - len(prompt_ids)
        if max(request.max_new_tokens, 1) > room:
            raise ContextLengthExceeded(
                _prompt_field(request),
                f"its {len(prompt_ids)} tokens and max_new_tokens = "
                f"{request.max_new_tokens} exceed {self._limit_in_words()}",
            )
        sequence = self._make(request, prompt_ids, request.max_new_tokens or room)
        with self._lock:
            self._admit(sequence)
            sequence.on_over(on_over)
            sequence.on_leave(lambda: self._leave(sequence))
            if sequence.is_complete:
                sequence.end()
            else:
                self._waiting.append(sequence)
                self._waiting_tokens += len(sequence.ids)
                self._fill()
        return sequence.stream(self._is_running)

    def cancel(self, name: str) -> bool:
        """Ends a sequence at its next token; its place is free at once. Returns False for an unknown name."""
        with self._lock:
            sequence = self._named(name)
            if sequence is not None:
                self._end_early(sequence)
        return sequence is not None

    def close(self) -> None:
        """Ends all sequences."""
        with self._lock:
            self._closed = True
            left = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._waiting_tokens = 0
        for sequence in left:
            sequence.fail(Unavailable("the router ends"))
        self._runner.close(CLOSE_TIMEOUT_S)

    # -- inside --

    def _named(self, name: str) -> TokenSequence | None:
        """Returns the running or waiting sequence of a name."""
        waiting = (sequence for sequence in self._waiting if sequence.name == name)
        return self._running.get(name) or next(waiting, None)

    def _leave(self, sequence: TokenSequence) -> None:
        """Ends a sequence whose reader has left; nothing if it has ended, even if another has its name by now."""
        with self._lock:
            if self._named(sequence.name) is sequence:
                self._end_early(sequence)

    def _end_early(self, sequence: TokenSequence) -> None:
        if self._running.pop(sequence.name, None) is not None:
            self._runner.cancel(sequence)
        else:
            self._leave_queue(sequence)
        sequence.end()
        self._fill()

    def _make(self, request: GenerationRequest, prompt_ids: Sequence[int], max_new_tokens: int) -> TokenSequence:
        try:
            return self._make_sequence(request, prompt_ids, max_new_tokens)
        except Exception as exc:  # of the tokenizer
            raise sequence_error(request.request_id, exc, "reading its generated tokens") from exc

    def _limit_in_words(self) -> str:
        if self.max_tokens == self._max_positions:
            return f"the model's {self.max_tokens}"
        return f"the model's room of {self.max_tokens} (serve.max_cached_tokens)"

    def _admit(self, sequence: TokenSequence) -> None:
        limits = self._limits
        if self._closed:
            raise Unavailable("the router ends")
        if self._named(sequence.name) is not None:
            raise InvalidMessage("request_id", f"a generation named {sequence.name} runs already")
        if len(self._running) < limits.max_running and not self._waiting:
            return
        if len(self._waiting) >= limits.max_waiting:
            raise self._exhausted(
                f"{len(self._running)} requests run and {len(self._waiting)} wait already: try again later"
            )
        if self._waiting and self._waiting_tokens + len(sequence.ids) > limits.max_waiting_tokens:
            raise self._exhausted(f"requests with {self._waiting_tokens} tokens wait already: try again later")

    def _exhausted(self, message: str) -> Exhausted:
        turns = (len(self._waiting) + 1) / self._limits.max_running
        return Exhausted(message, retry_after_s=min(max(self._sequence_s * turns, 1.0), MAX_RETRY_AFTER_S))

    def _fill(self) -> None:
        """Hands waiting sequences to the runner, as far as there is room."""
        while self._waiting and len(self._running) < self._limits.max_running and not self._closed:
            sequence = self._waiting[0]
            self._leave_queue(sequence)
            sequence.begun_s = time.monotonic()
            self._running[sequence.name] = sequence
            try:
                self._begin(sequence)
            except MoeClusterError as exc:
                self._running.pop(sequence.name, None)
                sequence.fail(exc)
            except Exception as exc:  # from torch or transformers: the sequence must not hold its place forever
                logger.exception("sequence %s is not begun", sequence.name)
                self._running.pop(sequence.name, None)
                sequence.fail(Unavailable(f"the router cannot generate: {type(exc).__name__}: {exc}"))

    def _begin(self, sequence: TokenSequence) -> None:
        if self._replacing or not self._runner.is_alive():
            self._replace_runner()
        self._runner.add(sequence)

    def _replace_runner(self) -> None:
        if not self._replacing:
            self._replacing = True
            # In a thread of its own: the caller may be the dying runner's thread.
            threading.Thread(target=self._runner.close, args=(CLOSE_TIMEOUT_S,), daemon=True).start()
        self._runner = self._make_runner(self._ended, self._failed)
        self._replacing = False

    def _leave_queue(self, sequence: TokenSequence) -> None:
        self._waiting.remove(sequence)
        self._waiting_tokens -= len(sequence.ids)

    def _ended(self, sequence: TokenSequence, experts: Mapping[ExpertId, int]) -> None:
        sequence.end(experts)
        if sequence.begun_s is not None:
            taken_s = time.monotonic() - sequence.begun_s
            self._sequence_s += NEW_WEIGHT * (taken_s - self._sequence_s)
        self._make_room(sequence)

    def _failed(self, sequence: TokenSequence, error: MoeClusterError) -> None:
        sequence.fail(error)
        self._make_room(sequence)

    def _make_room(self, sequence: TokenSequence) -> None:
        with self._lock:
            if self._running.get(sequence.name) is sequence:
                del self._running[sequence.name]
            self._fill()

    def _is_running(self) -> bool:
        return not self._closed and not self._replacing and self._runner.is_alive()


def _prompt_field(request: GenerationRequest) -> str:
    """The field that the prompt came in."""
    return "prompt_ids" if request.prompt_ids else "messages_json" if request.messages_json else "prompt"
