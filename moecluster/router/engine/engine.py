"""The engine: texts are admitted, wait in order, and are written together; which way, its writer knows.

One interface over two ways. Families whose attention runs on transformers' paged cache are batched continuously: a text
joins at the next step and leaves at its last. Others are written in padded batches by `generate()`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from moecluster.config.sections import ServeConfig
from moecluster.errors import Exhausted, InvalidMessage, MoeClusterError, Unavailable
from moecluster.generation import GenerationPiece, GenerationRequest
from moecluster.router.engine.batch_errors import text_error
from moecluster.router.engine.sequence import RunningText
from moecluster.types import ExpertId

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
FIRST_TEXT_S = 1.0  # how long a text takes, before one has ended
MAX_RETRY_AFTER_S = 60.0
NEW_WEIGHT = 0.2  # of the newest text in the mean duration


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """How much is taken on at once."""

    max_running: int = 64  # texts written together
    max_waiting: int = 256  # texts behind those; beyond it they are refused
    max_waiting_tokens: int = 2**18  # of their prompts
    max_cached_tokens: int = 2**14  # of all running texts, prompts included
    max_batch_tokens: int = 512  # computed at once

    @classmethod
    def of(cls, serve: ServeConfig) -> Self:
        """Those of the settings."""
        return cls(
            max_running=serve.max_running,
            max_waiting=serve.max_waiting,
            max_waiting_tokens=serve.max_waiting_tokens,
            max_cached_tokens=serve.max_cached_tokens,
            max_batch_tokens=serve.max_batch_tokens,
        )


class Writer(Protocol):
    """Writes texts until they end."""

    max_tokens: int  # most that one text may have, prompt included

    def write(self, text: RunningText) -> None:
        """Begins a text, which is then over at some time. Raises Unavailable if no thread writes."""

    def cancel(self, text: RunningText) -> None:
        """The text is over already: it need not be computed any further."""

    def is_alive(self) -> bool:
        """Whether texts are still written."""

    def close(self, timeout_s: float) -> None:
        """Gives up what is left."""


OnEnd = Callable[[RunningText, Mapping[ExpertId, int]], None]
OnFailure = Callable[[RunningText, MoeClusterError], None]
MakeWriter = Callable[[OnEnd, OnFailure], Writer]
MakeText = Callable[[GenerationRequest, Sequence[int], int], RunningText]  # of prompt ids and max_new_tokens


class Engine:
    """Thread-safe. Ends with close()."""

    def __init__(
        self, make_writer: MakeWriter, make_text: MakeText, limits: EngineLimits, *, max_positions: int | None = None
    ) -> None:
        """make_writer is called now, and again if its writer dies. max_positions: of the model."""
        self._make_writer = make_writer
        self._make_text = make_text
        self._max_positions = max_positions
        self._limits = limits
        self._lock = threading.RLock()
        self._running: dict[str, RunningText] = {}
        self._waiting: deque[RunningText] = deque()
        self._waiting_tokens = 0
        self._text_s = FIRST_TEXT_S
        self._closed = False
        self._writer = make_writer(self._ended, self._failed)

    @property
    def max_tokens(self) -> int:
        """Most that one text may have, prompt included."""
        return min(self._writer.max_tokens, self._max_positions or self._writer.max_tokens)

    @property
    def running(self) -> int:
        """Texts that are being written."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Texts that wait to be begun."""
        return len(self._waiting)

    def begin(
        self,
        request: GenerationRequest,
        prompt_ids: Sequence[int],
        *,
        on_over: Callable[[], object] = lambda: None,
    ) -> Iterator[GenerationPiece]:
        """Takes a text on; its pieces as they come. on_over: called once it is written, or given up.

        Raises Exhausted if too much waits, InvalidMessage if it is longer than there is room for, or one of its name
        runs already, RequestFailed if what was written elsewhere cannot be read; then on_over is not called.
        """
        room = self.max_tokens - len(prompt_ids)
        if max(request.max_new_tokens, 1) > room:
            raise InvalidMessage(
                f"{_prompt_field(request)}: its {len(prompt_ids)} tokens and max_new_tokens = "
                f"{request.max_new_tokens} exceed {self._limit_in_words()}"
            )
        text = self._made(request, prompt_ids, request.max_new_tokens or room)
        with self._lock:
            self._admit(text)
            text.on_over(on_over)
            text.on_leave(lambda: self.cancel(text.name))
            if text.is_complete:
                text.end()
            else:
                self._waiting.append(text)
                self._waiting_tokens += len(text.ids)
                self._fill()
        return text.pieces(self._is_written)

    def cancel(self, name: str) -> bool:
        """Ends a text at its next token; its place is free at once. False if there is none of that name."""
        with self._lock:
            text = self._running.pop(name, None)
            if text is not None:
                self._writer.cancel(text)
            else:
                text = next((waiting for waiting in self._waiting if waiting.name == name), None)
                if text is None:
                    return False
                self._leave_queue(text)
            text.end()
            self._fill()
        return True

    def close(self) -> None:
        """Ends all texts."""
        with self._lock:
            self._closed = True
            left = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._waiting_tokens = 0
        for text in left:
            text.fail(Unavailable("the router ends"))
        self._writer.close(CLOSE_TIMEOUT_S)

    # -- inside --

    def _made(self, request: GenerationRequest, prompt_ids: Sequence[int], max_new_tokens: int) -> RunningText:
        try:
            return self._make_text(request, prompt_ids, max_new_tokens)
        except Exception as exc:  # of the tokenizer
            raise text_error(request.request_id, exc, "reading what is written of it") from exc

    def _limit_in_words(self) -> str:
        if self.max_tokens == self._max_positions:
            return f"the model's {self.max_tokens}"
        return f"the model's room of {self.max_tokens} (serve.max_cached_tokens)"

    def _admit(self, text: RunningText) -> None:
        limits = self._limits
        if self._closed:
            raise Unavailable("the router ends")
        if text.name in self._running or any(waiting.name == text.name for waiting in self._waiting):
            raise InvalidMessage(f"request_id: a generation named {text.name} runs already")
        if len(self._running) < limits.max_running and not self._waiting:
            return
        if len(self._waiting) >= limits.max_waiting:
            raise self._exhausted(
                f"{len(self._running)} texts run and {len(self._waiting)} wait already: try again later"
            )
        if self._waiting and self._waiting_tokens + len(text.ids) > limits.max_waiting_tokens:
            raise self._exhausted(f"texts with {self._waiting_tokens} tokens wait already: try again later")

    def _exhausted(self, message: str) -> Exhausted:
        turns = (len(self._waiting) + 1) / self._limits.max_running
        return Exhausted(message, retry_after_s=min(max(self._text_s * turns, 1.0), MAX_RETRY_AFTER_S))

    def _fill(self) -> None:
        """Lets the writer begin what waits, as far as there is room."""
        while self._waiting and len(self._running) < self._limits.max_running and not self._closed:
            text = self._waiting[0]
            self._leave_queue(text)
            text.begun_s = time.monotonic()
            self._running[text.name] = text
            try:
                self._write(text)
            except MoeClusterError as exc:
                self._running.pop(text.name, None)
                text.fail(exc)
            except Exception as exc:  # of torch or transformers: it must not hold its place for ever
                logger.exception("text %s is not begun", text.name)
                self._running.pop(text.name, None)
                text.fail(Unavailable(f"the router cannot write: {type(exc).__name__}: {exc}"))

    def _write(self, text: RunningText) -> None:
        if not self._writer.is_alive():
            # By a thread of its own: it is the dying writer's thread that may have come here.
            threading.Thread(target=self._writer.close, args=(CLOSE_TIMEOUT_S,), daemon=True).start()
            self._writer = self._make_writer(self._ended, self._failed)
        self._writer.write(text)

    def _leave_queue(self, text: RunningText) -> None:
        self._waiting.remove(text)
        self._waiting_tokens -= len(text.ids)

    def _ended(self, text: RunningText, experts: Mapping[ExpertId, int]) -> None:
        text.end(experts)
        if text.begun_s is not None:
            taken_s = time.monotonic() - text.begun_s
            self._text_s += NEW_WEIGHT * (taken_s - self._text_s)
        self._make_room(text)

    def _failed(self, text: RunningText, error: MoeClusterError) -> None:
        text.fail(error)
        self._make_room(text)

    def _make_room(self, text: RunningText) -> None:
        with self._lock:
            if self._running.get(text.name) is text:
                del self._running[text.name]
            self._fill()

    def _is_written(self) -> bool:
        return not self._closed and self._writer.is_alive()


def _prompt_field(request: GenerationRequest) -> str:
    """The field that the prompt came in."""
    return "prompt_ids" if request.prompt_ids else "messages_json" if request.messages_json else "prompt"
