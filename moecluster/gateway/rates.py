"""Limits the rate of each client's requests. Beyond it: 429."""

import time
from collections.abc import Callable

from moecluster.gateway.api_errors import too_many

MINUTE_S = 60.0
MAX_CLIENTS = 2**16  # remembered; the one that was silent longest is forgotten


class RequestRates:
    """Requests that each client may still send: at most a minute's worth at once, refilled evenly. Used by one event
    loop."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """per_minute: requests of one client; 0: no limit."""
        self._per_minute = per_minute
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # client -> (requests, when counted), longest silent first

    def take(self, client: str) -> None:
        """Counts a request. Raises ApiError 429, which says when the next one is allowed."""
        if not self._per_minute:
            return
        now_s = self._clock()
        left, counted_s = self._left.pop(client, (float(self._per_minute), now_s))
        left = min(left + (now_s - counted_s) * self._per_minute / MINUTE_S, float(self._per_minute))
        is_allowed = left >= 1.0
        self._left[client] = left - is_allowed, now_s
        if len(self._left) > MAX_CLIENTS:
            del self._left[next(iter(self._left))]
        if not is_allowed:
            raise too_many(
                f"more than {self._per_minute} requests a minute; try again later",
                retry_after_s=round((1.0 - left) * MINUTE_S / self._per_minute, 3),
            )
