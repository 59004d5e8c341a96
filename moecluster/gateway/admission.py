"""How much the front takes on at once: bodies in memory, requests, texts. Beyond it: 429.

A body takes no room from others before it is complete: when room runs out, one that is still awaited is given up, the
oldest of the client that has most of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moecluster.config.sections import ServeConfig
from moecluster.gateway.api_errors import too_many
from moecluster.gateway.crowd import Crowd, Place


class Admission:
    """Counts what is in flight. Used by one event loop."""

    def __init__(self, settings: ServeConfig) -> None:
        self._settings = settings
        self.requests = 0  # from the last byte of the body to the last of the answer
        self.texts = 0  # a request may ask for several
        self.body_bytes = 0  # of bodies that are awaited, and of requests
        self.awaited = Crowd()  # bodies of which something is missing

    @contextmanager
    def body(self, parties: tuple[str, ...], end: Callable[[], None]) -> Iterator[Place]:
        """While a body is awaited and its request answered. end: gives it up; parties: whose it is. Raises Refusal."""
        self._check_requests()
        if len(self.awaited) >= self._settings.max_awaited_bodies:
            self._give_up(lambda place: 1)
        place = Place(parties=parties, end=end)
        self.awaited.enter(place)
        try:
            yield place
        finally:
            self.awaited.leave(place)
            self.body_bytes -= place.held_bytes

    def take(self, place: Place, count_bytes: int) -> None:
        """More of a body. Raises Refusal when the bodies of all requests are too many bytes."""
        while self.body_bytes + count_bytes > self._settings.max_buffered_bytes:
            if place.ended or self._give_up(lambda awaited: awaited.held_bytes) in (None, place):
                raise too_many("the requests in flight are too large together; try again later")
        self.body_bytes += count_bytes
        place.held_bytes += count_bytes

    @contextmanager
    def request(self, place: Place) -> Iterator[None]:
        """While a request is answered whose body is complete. Raises Refusal."""
        self.awaited.leave(place)
        self._check_requests()
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

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

    def _check_requests(self) -> None:
        if self.requests >= self._settings.max_inflight:
            raise too_many(f"{self.requests} requests are in flight; try again later")

    def _give_up(self, weigh: Callable[[Place], int]) -> Place | None:
        given_up = self.awaited.end_one(weigh)
        if given_up is not None:
            self.body_bytes -= given_up.held_bytes
            given_up.held_bytes = 0
        return given_up
