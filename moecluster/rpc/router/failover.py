"""Decides when a request continues on another router and when it fails: rules shared by clients and the gateway.

Does no I/O. The caller knows the routers' addresses, chooses the order, and does the waiting.
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

MAX_BROKEN_BATCHES = 2  # that a request may survive; at the next one, the request itself is assumed to break them

_FINAL = (InvalidMessage, UserError, RequestFailed, ExpertsLost)  # another router would fail the same way


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a request fails over from router to router."""

    request_timeout_s: float  # from its start to its end
    router_wait_timeout_s: float  # without progress on any router
    max_failures: int = 1  # unexplained errors in a row, without a token between them; the last one is raised
    awaits_lost: bool = True  # wait for a lost router, which may still hold a started request's weights


class RequestFailover:
    """The failover state of one request. It proceeds in rounds; in a round, each router is asked once.

    A request gives up the weight version that it started with only if some router does not have it, and either patience
    is over or no router that may have it is full (or lost, if lost routers are awaited).
    """

    def __init__(self, patience: Patience) -> None:
        """Starts the request's timeouts."""
        self._patience = patience
        self._fruitless_since_s = time.monotonic()
        self._deadline_s = self._fruitless_since_s + patience.request_timeout_s
        self._failures = 0  # since the last token
        self._broken_batches = 0  # broken batches that contained the request
        self.lost: MoeClusterError = Unavailable("there is no router to ask")  # why the last router failed
        self.full: Exhausted | None  # of this round's full routers, the one with room first
        self.stale: StaleRequest | None  # of this round: a router is without the request's weights
        self._away: bool  # a router was lost in this round, and is awaited
        self.begin_round()

    @property
    def left_s(self) -> float:
        """Seconds until the request's deadline; at least 0."""
        return max(self._deadline_s - time.monotonic(), 0.0)

    def begin_round(self) -> None:
        """Forgets the routers' errors of the last round."""
        self.full = self.stale = None
        self._away = False

    def progressed(self) -> None:
        """Records that a router generated tokens for the request."""
        self._fruitless_since_s = time.monotonic()
        self._failures = 0

    def failed(self, error: MoeClusterError, *, pinned: bool = True) -> None:
        """Records that a router refused the request or broke off. Raises errors that no other router would fix.

        pinned: the request names a weight version, so a StaleRequest means that the router does not have it.
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
        """Whether patience is over, or will be after waiting wait_s."""
        return time.monotonic() - self._fruitless_since_s + wait_s > self._patience.router_wait_timeout_s

    def gives_up_version(self, *, is_over: bool) -> bool:
        """Whether the request should continue with any served weights. is_over: there will be no further round."""
        may_be_held = self.full is not None or self._away
        return self.stale is not None and (is_over or not may_be_held)

    def _count(self, error: MoeClusterError) -> None:
        """Counts the error; raises it once there are too many."""
        if isinstance(error, BatchBroken):
            self._broken_batches += 1
            if self._broken_batches > MAX_BROKEN_BATCHES:
                raise error
        elif not isinstance(error, Unavailable):
            self._failures += 1
            if self._failures >= self._patience.max_failures:
                raise error


def is_loss(error: MoeClusterError, *, pinned: bool = True) -> bool:
    """Whether the error is the router's fault, rather than due to the request, its weights, or a full router."""
    return not isinstance(error, (*_FINAL, Exhausted)) and not (pinned and isinstance(error, StaleRequest))
