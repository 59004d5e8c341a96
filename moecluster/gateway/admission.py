"""Admission control: bounds the bodies in memory, the requests and the choices in flight. Beyond them: 429.

An incomplete body does not keep others out: when room runs out, an incomplete one is dropped, the oldest of the client
that holds most.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moecluster.config.sections import ServeConfig
from moecluster.gateway.api_errors import too_many
from moecluster.gateway.crowd import Crowd, Place


class Admission:
    """Counts bodies, requests and choices in flight. Used by one event loop."""

    def __init__(self, settings: ServeConfig) -> None:
        self._settings = settings
        self.requests = 0  # from the last byte of the body to the last of the response
        self.generations = 0  # choices: a request may ask for several
        self.body_bytes = 0  # of incomplete bodies and of requests in flight
        self.awaited = Crowd()  # incomplete bodies

    @contextmanager
    def body(self, parties: tuple[str, ...], end: Callable[[], None]) -> Iterator[Place]:
        """Context: a body is read and its request answered. Raises ApiError.

        parties: the clients that the body counts against. end: called to drop the body while it is incomplete.
        """
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
        """Adds bytes to a body. Raises ApiError if all bodies together would exceed max_buffered_bytes."""
        while self.body_bytes + count_bytes > self._settings.max_buffered_bytes:
            if place.ended or self._give_up(lambda awaited: awaited.held_bytes) in (None, place):
                raise too_many("the requests in flight are too large together; try again later")
        self.body_bytes += count_bytes
        place.held_bytes += count_bytes

    @contextmanager
    def request(self, place: Place) -> Iterator[None]:
        """Context: a request with a complete body is answered. Raises ApiError."""
        self.awaited.leave(place)
        self._check_requests()
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextmanager
    def generating(self, generations: int) -> Iterator[None]:
        """Context: this many choices are generated. Raises ApiError."""
        if self.generations + generations > self._settings.max_inflight:
            raise too_many(
                f"{self.generations} choices are being generated, and {generations} more are too many; try again later"
            )
        self.generations += generations
        try:
            yield
        finally:
            self.generations -= generations

    def _check_requests(self) -> None:
        if self.requests >= self._settings.max_inflight:
            raise too_many(f"{self.requests} requests are in flight; try again later")

    def _give_up(self, weigh: Callable[[Place], int]) -> Place | None:
        given_up = self.awaited.end_one(weigh)
        if given_up is not None:
            self.body_bytes -= given_up.held_bytes
            given_up.held_bytes = 0
        return given_up
