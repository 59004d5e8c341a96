"""When a request goes on at another router, and when it ends: the rules that clients and the gateway share.

Does no I/O. Whoever asks the routers knows where they are, in which order to ask them, and how to wait.
"""

import time
from dataclasses import dataclass

from moecluster.errors import (
    BatchBroken,
    Exhausted,
    ExpertsLost,
    InvalidMessage,
    MoeClusterError,
    RequestFailed,
    StaleRequest,
    Unavailable,
    UserError,
)

MAX_BROKEN_BATCHES = 2  # that a request is sent on after: at the next one it is taken for what breaks them

_FINAL = (InvalidMessage, UserError, RequestFailed, ExpertsLost)  # would be the same at another router


@dataclass(frozen=True, kw_only=True)
class Patience:
    """For how long a request is taken from router to router."""

    request_timeout_s: float  # from its start to its end
    router_wait_timeout_s: float  # without a router that adds to it
    max_failures: int = 1  # unexplained errors, without a token between them; the last one is raised
    awaits_lost: bool = True  # a router that does not answer may come back with the weights of a started request


class RequestFailover:
    """The state of one request on its way from router to router, in rounds: in a round, each router is asked once.

    The weights that a request was started with are given up only when some router is there without them, and none that
    may hold them is full, or away if lost routers are awaited; or when patience is over.
    """

    def __init__(self, patience: Patience) -> None:
        """The time runs from now on."""
        self._patience = patience
        self._fruitless_since_s = time.monotonic()
        self._deadline_s = self._fruitless_since_s + patience.request_timeout_s
        self._failures = 0  # since the last token
        self._broken_batches = 0  # that the request was in
        self.lost: MoeClusterError = Unavailable("there is no router to ask")  # why the last router was lost
        self.full: Exhausted | None  # of this round's full routers, the one that has room first
        self.stale: StaleRequest | None  # of this round: a router is there without the request's weights
        self._away: bool  # in this round a router was lost
        self.begin_round()

    @property
    def left_s(self) -> float:
        """Until the request's deadline; at least 0."""
        return max(self._deadline_s - time.monotonic(), 0.0)

    def begin_round(self) -> None:
        """What routers answered before counts no more."""
        self.full = self.stale = None
        self._away = False

    def progressed(self) -> None:
        """A router has added to the request."""
        self._fruitless_since_s = time.monotonic()
        self._failures = 0

    def failed(self, error: MoeClusterError, *, pinned: bool = True) -> None:
        """A router did not take the request, or broke off. Raises any error that no other router would mend.

        pinned: the request asked for certain weights, so that a StaleRequest says that the router is without them.
        """
        if isinstance(error, Exhausted):
            if self.full is None or (error.retry_after_s or 0.0) < (self.full.retry_after_s or 0.0):
                self.full = error
        elif isinstance(error, StaleRequest) and pinned:
            self.stale = error
        elif isinstance(error, _FINAL):
            raise error
        else:
            self._count(error)
            self.lost = error
            self._away = self._patience.awaits_lost

    def is_over(self, wait_s: float = 0.0) -> bool:
        """Whether patience is over, or will be after a wait."""
        return time.monotonic() - self._fruitless_since_s + wait_s > self._patience.router_wait_timeout_s

    def gives_up_version(self, *, is_over: bool) -> bool:
        """Whether the request is to go on with whatever weights are served. is_over: there will be no other round."""
        may_be_held = self.full is not None or self._away
        return self.stale is not None and (is_over or not may_be_held)

    def _count(self, error: MoeClusterError) -> None:
        """Raises the error once it is one too many."""
        if isinstance(error, BatchBroken):
            self._broken_batches += 1
            if self._broken_batches > MAX_BROKEN_BATCHES:
                raise error
        elif not isinstance(error, Unavailable):
            self._failures += 1
            if self._failures >= self._patience.max_failures:
                raise error


def is_loss(error: MoeClusterError, *, pinned: bool = True) -> bool:
    """Whether it speaks against the router, rather than against the request, its weights, or more requests now."""
    return not isinstance(error, (*_FINAL, Exhausted)) and not (pinned and isinstance(error, StaleRequest))
