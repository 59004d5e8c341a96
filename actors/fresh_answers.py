"""Questions about Ray's cluster that are answered within a short time, or not at all.

Ray waits up to a minute for its control store while that restarts. What it answers then is of no use: by the time the
answer comes, the cluster may have changed.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

from actors.ray_calls import last_line
from moecluster.errors import MoeClusterError, Unavailable

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, kw_only=True)
class _Asked(Generic[AnswerT]):
    at_s: float
    answer: Future[AnswerT]


class FreshAnswers(Generic[AnswerT]):
    """One question, which any thread may ask. While an answer is overdue, it is not asked again."""

    def __init__(self, ask: Callable[[], AnswerT], what: str, *, max_age_s: float) -> None:
        """what: is asked for, for the error. max_age_s: an answer that took longer is not used."""
        self._ask = ask
        self._what = what
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._last: _Asked[AnswerT] | None = None
        self._to_ask: SimpleQueue[Future[AnswerT]] = SimpleQueue()
        threading.Thread(target=self._run, name=f"ask {what}", daemon=True).start()

    def get(self) -> AnswerT:
        """Returns the answer. Raises Unavailable if there is none in time, or if Ray or the question raises."""
        with self._lock:
            asked = self._last
            if asked is None or asked.answer.done():
                asked = self._last = _Asked(at_s=time.monotonic(), answer=Future())
                self._to_ask.put(asked.answer)
        try:
            return asked.answer.result(max(asked.at_s + self._max_age_s - time.monotonic(), 0.0))
        except TooLate as exc:
            raise Unavailable(f"Ray does not say {self._what} within {self._max_age_s:g} s") from exc
        except MoeClusterError:
            raise
        except Exception as exc:  # Ray raises many kinds while its control store is away
            raise Unavailable(f"Ray does not say {self._what}: {last_line(exc)}") from exc

    def _run(self) -> None:
        """Asks in one thread for good: Ray keeps state for each thread that calls it."""
        while True:
            answer = self._to_ask.get()
            try:
                answer.set_result(self._ask())
            except BaseException as exc:
                answer.set_exception(exc)
