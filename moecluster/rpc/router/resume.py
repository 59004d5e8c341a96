"""What a request has generated so far, at any router, and how to resume it when its router is lost."""

import dataclasses
import logging

from moecluster.generation import GenerationChunk, GenerationRequest

logger = logging.getLogger(__name__)


class ResumableRequest:
    """One request. Does no I/O: the caller sends next_request() to a router and passes the chunks to take()."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request  # as it was last sent
        self.ids: list[int] = []  # generated so far
        self.weight_version = 0  # that generated these ids and should generate the rest; 0: any
        self._wanted = request
        self._attempts = 0
        self._had = 0  # number of ids when it was last sent

    @property
    def grew(self) -> bool:
        """Whether the last router has generated any tokens."""
        return len(self.ids) > self._had

    def next_request(self) -> GenerationRequest:
        """Returns the request to send next: it continues after the received tokens."""
        # A new name: a router that lost its connection to us may still run the earlier attempt.
        name = self._wanted.request_id + (f"-{self._attempts}" if self._attempts else "")
        self._attempts += 1
        self._had = len(self.ids)
        self.request = dataclasses.replace(
            self._wanted, request_id=name, generated_ids=tuple(self.ids), weight_version=self.weight_version
        )
        return self.request

    def take(self, chunk: GenerationChunk) -> None:
        """Adds a received chunk."""
        self.ids += chunk.ids
        if chunk.ids:
            self.weight_version = chunk.weight_version

    def give_up_version(self) -> None:
        """Continues with the served weight version, rather than fail: no router holds the request's own any more."""
        if self.weight_version:
            logger.warning(
                "no router holds weight version %d: a request continues with the served weights after %d tokens",
                self.weight_version,
                len(self.ids),
            )
        self.weight_version = 0
