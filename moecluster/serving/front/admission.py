"""How much the front takes on at once: bodies in memory, requests, texts. Beyond it: 429."""

from collections.abc import Iterator
from contextlib import contextmanager

from moecluster.sections import ServeConfig
from moecluster.serving.front.refusals import too_many


class Admission:
    """Counts what is in flight. Used by one event loop."""

    def __init__(self, settings: ServeConfig) -> None:
        self._settings = settings
        self.requests = 0  # with a body, from its first byte to the answer's last
        self.texts = 0  # a request may ask for several
        self.body_bytes = 0

    @contextmanager
    def request(self) -> Iterator["BodyAllowance"]:
        """While a request with a body is answered. Raises Refusal."""
        if self.requests >= self._settings.max_inflight:
            raise too_many(f"{self.requests} requests are in flight; try again later")
        allowance = BodyAllowance(self, self._settings.max_buffered_bytes)
        self.requests += 1
        try:
            yield allowance
        finally:
            self.requests -= 1
            self.body_bytes -= allowance.taken_bytes

    @contextmanager
    def writing(self, texts: int) -> Iterator[None]:
        """While texts are written. Raises Refusal."""
        if self.texts + texts > self._settings.max_inflight:
            raise too_many(f"{self.texts} texts are being written, and {texts} more are too many; try again later")
        self.texts += texts
        try:
            yield
        finally:
            self.texts -= texts


class BodyAllowance:
    """What one request's body takes of the memory for all bodies."""

    def __init__(self, admission: Admission, limit_bytes: int) -> None:
        self.taken_bytes = 0
        self._admission = admission
        self._limit_bytes = limit_bytes

    def take(self, count_bytes: int) -> None:
        """Raises Refusal when the bodies of all requests are too many bytes."""
        if self._admission.body_bytes + count_bytes > self._limit_bytes:
            raise too_many("the requests in flight are too large together; try again later")
        self._admission.body_bytes += count_bytes
        self.taken_bytes += count_bytes
